"""Calibration end to end: within the budget, with the quality it reports, the same after an interruption."""

import itertools
import json
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from families import tiny as tiny_model
from small_tokenizer import Small

import headsink
from headsink import HeadsinkError, Pattern, Plan, calibrate
from headsink.calibration import calibrate as calibrate_module
from headsink.calibration.calibrate import BUDGETS, TAIL, Calibration, _documents, default_quality_contexts
from headsink.calibration.method import POLICIES, SINK, WINDOWS, Method
from headsink.calibration.score_fit import fit, measure_importance
from headsink.calibration.search import Search, Step
from headsink.compression.reconstruction import prompt_tokens
from headsink.data import corpus
from headsink.data import documents as probes
from headsink.data.documents import FORMS
from headsink.evaluation.options import LEAST_CONTEXT
from headsink.evaluation.quality import score
from headsink.eviction.pattern import FULL
from headsink.models.spec import describe

CONTEXT = 600
FAMILIES = ("llama", "llama-mha", "qwen3", "gemma2", "gemma3", "granite", "gpt-oss")


def tiny(family, seed=0, dtype=torch.float32):
    model = tiny_model(family, seed, dtype)
    model.config.max_position_embeddings = 1024
    return model


@pytest.fixture(scope="module")
def small(tokenizer):
    return Small(tokenizer)


@pytest.fixture(scope="module")
def make(small):
    """Calibrate a plan for a tiny model, by default without measuring quality."""

    def make(family="llama", *, model=None, **options):
        options = {"context": CONTEXT, "quality_contexts": (), "progress": False} | options
        if "max_kl" not in options:
            options.setdefault("budget", 0.4)
        return calibrate(model or tiny(family), small, **options)

    return make


def patterns(plan):
    return [layer and [head.pattern for head in layer] for layer in plan.layers]


def search_loss(calibration, rows):
    """Return the loss of patterns on the cached documents of a calibration."""
    return sum(float(r.loss(r.log_probs(rows), 0.25)) for r in calibration.cached) / len(calibration.cached)


# end to end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "once"), [*((family, False) for family in FAMILIES), ("llama", True), ("gemma3", True)]
)
def test_a_plan_meets_its_budget_and_records_its_calibration(family, once, make, small):
    model = tiny(family, dtype=torch.float64)  # in other dtypes cached documents round keys and values to 16 bits
    shape = describe(model)
    plan = make(model=model, budget=0.4, seed=3, method=Method(prefill_compression=once))
    plan.check(model)
    assert [layer is None for layer in plan.layers] == [window is not None for window in shape.windows]
    assert 0.2 < plan.kv_budget(CONTEXT) <= 0.4
    made = plan.calibration
    assert (made["budget"], made["context"], made["seed"]) == (0.4, [CONTEXT, CONTEXT], 3)
    assert made["domains"] == list(corpus.DOMAINS)
    assert made["kept"] == pytest.approx(plan.kv_budget(CONTEXT), abs=1e-4)
    assert made["dtype"] == "float64"
    assert made["method"]["policy"] == "headsink"
    assert made["method"]["prefill_compression"] == plan.prefill_compression == once
    assert made["forms"] == list(FORMS["calibration"])
    assert [document["text"] for document in made["documents"]] == list(corpus.DOMAINS)
    assert all(0.7 * (CONTEXT - TAIL) < d["tokens"] <= CONTEXT - TAIL for d in made["documents"])
    assert plan.quality == ()
    assert Plan.model_validate_json(plan.to_json()) == Plan.model_validate(json.loads(plan.to_json()))

    # The verified quality is that of running the plan on the same documents.
    calibration = Calibration(
        model, small, context=CONTEXT, seed=3, method=Method(prefill_compression=once), progress=False
    )
    scored = [score(model, plan, document) for document in calibration.documents]
    text = sum(float(continuations[0].kl.mean()) for continuations in scored) / len(scored)
    answers = sum(
        sum(float(b.kl.mean()) for b in continuations[1:]) / (len(continuations) - 1) for continuations in scored
    ) / len(scored)
    verified = made["verified"]
    assert verified["kl_text"] == pytest.approx(text, abs=2e-5)
    assert verified["kl_answers"] == pytest.approx(answers, abs=2e-5)
    assert verified["loss"] == pytest.approx(verified["kl_text"] + 0.25 * verified["kl_answers"], abs=2e-5)
    assert made["search_loss"] == pytest.approx(search_loss(calibration, patterns(plan)), abs=1e-5)
    if once:
        assert verified["loss"] == pytest.approx(made["search_loss"], abs=2e-5)

    # Scorer weights are those of the search, for heads with top-k keys.
    top_k = [head.top_k > 0 for row in plan.layers for head in row or [FULL] * shape.kv_heads]
    top_k = torch.tensor(top_k).view(shape.layers, -1, 1)
    assert top_k.any()
    found = torch.stack([plan.scores(layer) for layer in range(shape.layers)])
    torch.testing.assert_close(found, calibration.weights * top_k, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_plan_for_context_reconstruction_allocates_by_importance(family, make, small):
    model, method = tiny(family), Method(prefill_compression=True, reconstruct=True, refine=False)
    calibration = Calibration(model, small, context=CONTEXT, method=method, progress=False)
    planned = [layer for layer, window in enumerate(calibration.cached[0].shape.windows) if window is None]
    importance = calibration.importance[planned].flatten(0, 1)
    for budget in (0.2, 0.4):
        plan = calibration.plan(budget)
        assert plan.prefill_compression
        assert plan.reconstruction_prompt == tuple(small("\n\nRepeat the previous context exactly.\n\n")["input_ids"])
        assert budget - 0.01 < plan.kv_budget(CONTEXT) <= budget
        assert plan.calibration["search_loss"] is None
        assert plan.calibration["verified"]["kl_text"] > 0
        # The least important kept key of any head is more important than the most important evicted key of another.
        rows = [head.pattern for layer in planned for head in plan.layers[layer]]
        assert all(pattern.full or (pattern.sink, pattern.window) == (SINK, WINDOWS[0]) for pattern in rows)
        edges = []
        for pattern, own in zip(rows, importance, strict=True):
            if not pattern.full:
                order = own.sort(descending=True).values
                place = round(pattern.top_k / CONTEXT * len(order))
                edges += [(order[max(place - 3, 0)], order[min(place + 3, len(order) - 1)])]
        assert max(low for _, low in edges) <= min(high for high, _ in edges)
    calibration.method = Method(prefill_compression=True, reconstruct=True, refine=False, importance=False)
    plan = calibration.plan(0.3)
    assert len({head for row in plan.layers if row for head in (h.pattern for h in row)}) == 1
    assert 0.29 < plan.kv_budget(CONTEXT) <= 0.3
    assert plan.refit_values
    calibration.method = Method(
        prefill_compression=True, reconstruct=True, refine=False, importance=False, refit_values=False
    )
    assert calibration.plan(0.3).layers == plan.layers
    assert not calibration.plan(0.3).refit_values
    assert all(head.pattern.full for layer in planned for head in calibration.plan(1.0).layers[layer])
    with pytest.raises(HeadsinkError, match=r"budget: 0.05 of 600 tokens is less than the smallest plan, 0.060"):
        calibration.plan(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_windows_can_use_cache_relative_positions(budget, make):
    method = Method(policy="streaming-llm", positions="cache-relative")
    plan = make(model=tiny("llama"), budget=budget, method=method)
    assert plan.positions == "cache-relative"
    assert set(plan.counts()) == {f"4+0k+{int(budget * CONTEXT) - 4}"}
    with pytest.raises(HeadsinkError, match="positions: cache-relative positions need"):
        Method(positions="cache-relative")


@pytest.mark.slow
def test_budgets_of_few_heads_are_tuned_by_local_search(small, tmp_path, monkeypatch):
    """Not worse on the documents than allocation by importance, with the scores of context reconstruction; resumes if stopped."""
    model, file = tiny("gemma3"), tmp_path / "steps.json"

    def made(method, checkpoint=None):
        return Calibration(model, small, context=CONTEXT, method=method, checkpoint=checkpoint, progress=False)

    calibration = made(Method(prefill_compression=True, reconstruct=True), file)
    plan = calibration.plan(0.3)
    steps = [Step(**step) for step in json.loads(file.read_text())["steps"]]
    assert steps[-1].phase == "done"
    assert [head.pattern for row in plan.layers if row for head in row] == [
        pattern for row in steps[-1].plan() if row for pattern in row
    ]
    assert 0.28 < plan.kv_budget(CONTEXT) <= 0.3
    calibration.method, calibration.checkpoint = (
        Method(prefill_compression=True),
        None,
    )  # a later search is not changed by it
    assert calibration.plan(0.3) == made(Method(prefill_compression=True)).plan(0.3)
    by_need = made(Method(prefill_compression=True, reconstruct=True, refine=False)).plan(0.3)
    losses = []
    for tried in (by_need, plan):
        patterns = [None if row is None else [head.pattern for head in row] for row in tried.layers]
        for cached in calibration.cached:
            cached.set_importance(measure_importance(cached, calibration.prompt, whole=True))
        losses.append(sum(float(r.loss(r.log_probs(patterns), 0.25)) for r in calibration.cached) / 4)
    assert losses[1] < losses[0]
    assert losses[1] == pytest.approx(steps[-1].loss, rel=1e-5)
    monkeypatch.setattr(calibrate_module, "coordinate_descent", None)  # all is done: nothing is searched again
    assert made(Method(prefill_compression=True, reconstruct=True), file).plan(0.3) == plan
    monkeypatch.undo()
    key = json.loads(file.read_text())["key"]
    file.write_text(json.dumps({"key": key, "steps": [asdict(step) for step in steps[:2]]}))
    assert made(Method(prefill_compression=True, reconstruct=True), file).plan(0.3).calibration["verified"]["loss"] > 0
    resumed = [Step(**step) for step in json.loads(file.read_text())["steps"]]
    assert resumed[:2] == steps[:2]
    assert resumed[-1].loss <= steps[1].loss


@pytest.mark.slow
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_a_cached_document_equals_the_cache(family, once, small):
    """A cached document is exact if it is read in full attention, or with the same keys and values, that is with patterns in
    the last layer only."""
    model = tiny(family, dtype=torch.float64)
    calibration = Calibration(model, small, context=CONTEXT, method=Method(prefill_compression=once), progress=False)
    shape = describe(model)
    for pattern in (Pattern(4, 75, 32), Pattern(4, 20, 8), Pattern(0, 9, 0), Pattern(4, 0, 50)):
        rows = [None if window else [FULL] * shape.kv_heads for window in shape.windows]
        for layer in [n for n, row in enumerate(rows) if row] if once else [-1]:
            rows[layer] = [Pattern(4, 4, 16), pattern]
        plan = Plan.of(model, rows, calibration.weights, prefill_compression=once)
        kl = calibration._verify(plan)
        assert float(kl[0] + 0.25 * kl[1]) == pytest.approx(search_loss(calibration, rows), rel=1e-3)
        other = calibration._verify(plan.model_copy(update={"prefill_compression": not once}))
        assert float(other[0]) != pytest.approx(float(kl[0]), rel=0.05)


@pytest.mark.slow
def test_scores_and_start_come_from_context_reconstruction(small, tmp_path):
    calibration = Calibration(
        tiny("llama"),
        small,
        context=CONTEXT,
        method=Method(refine=False),
        checkpoint=tmp_path / "steps",
        progress=False,
    )
    importance = [measure_importance(cached, prompt_tokens(small)) for cached in calibration.cached]
    assert torch.equal(calibration.weights, fit(calibration.cached, importance))
    pooled = torch.cat([one.attention for one in importance], -1)
    search, steps = Search(calibration.cached, CONTEXT, calibration.method, 0, pooled), []
    search.run(0.4, report=steps.append)
    calibration.plan(0.4)
    found = json.loads((tmp_path / "steps").read_text())["steps"]
    assert [Step(**step).plan() for step in found] == [step.plan() for step in steps]
    assert found[0]["kept"] > 0.15  # starting from the smallest plan it would be only little above it


@pytest.mark.slow
def test_plans_are_repeatable(make):
    model = tiny("llama")
    assert make(model=model) == make(model=model)
    assert make(model=model).calibration != make(model=model, seed=1).calibration


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "family"), list(zip(POLICIES, itertools.cycle(["llama-mha", "gemma3"]))))
def test_every_policy_makes_plans_that_run(policy, family, make):
    model, budget = tiny(family), 0.75  # a streaming head of on-off keeps 320 of 600 tokens
    plan = make(model=model, budget=budget, method=Method(policy=policy))
    assert plan.kv_budget(CONTEXT) <= budget
    assert plan.calibration["method"]["policy"] == policy
    with headsink.apply(model, plan), torch.no_grad():
        assert torch.isfinite(model(torch.randint(3, 211, (1, 580))).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_budget_1_gives_the_models_outputs(family, make):
    plan = make(model=tiny(family, dtype=torch.float64), budget=1.0)
    assert all(pattern == FULL for row in patterns(plan) if row for pattern in row)
    verified = plan.calibration["verified"]
    assert max(map(abs, verified.values())) < 1e-5


@pytest.mark.slow
def test_plans_of_long_contexts_run_over_fewer_documents(make, monkeypatch):
    assert [one["verified"] for one in make(budget=0.5).calibration["documents"]] == [True] * 4
    monkeypatch.setattr(calibrate_module, "VERIFIED", 2 * CONTEXT)
    assert [one["verified"] for one in make(budget=0.5).calibration["documents"]] == [True, True, False, False]
    monkeypatch.setattr(calibrate_module, "VERIFIED", 1)
    assert [one["verified"] for one in make(budget=0.5).calibration["documents"]] == [True, False, False, False]


@pytest.mark.slow
def test_quality_is_measured_at_the_given_contexts(make):
    for contexts in [(600, 512), ()]:
        assert [quality.context for quality in make("gemma3", quality_contexts=contexts).quality] == list(contexts)
    quality = make("gemma3", quality_contexts=None, context=1024).quality
    assert [q.context for q in quality] == [512, 1024]
    assert quality[-1].kv_bytes < quality[-1].kv_bytes_full
    assert {r.form for r in quality[0].retrieval} <= set(FORMS["heldout"])


def test_quality_is_measured_at_the_context_and_a_shorter_one():
    assert default_quality_contexts(400) == ()
    assert default_quality_contexts(600) == (600,)
    assert default_quality_contexts(2000) == (1000, 2000)
    assert default_quality_contexts(2048) == (1024, 2048)
    assert default_quality_contexts(32_768) == (2048, 32_768)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_budget_is_met_at_both_ends_of_a_range_of_contexts(family, make):
    model, ends = tiny(family), (LEAST_CONTEXT, 1000)
    plan = make(model=model, context=ends, budget=0.5)
    assert 0.3 < plan.kv_budget(ends[0]) <= 0.5
    assert plan.kv_budget(ends[1]) <= 0.5
    assert plan.calibration["context"] == list(ends)
    assert plan.calibration["kept"] == pytest.approx(plan.kv_budget(ends[0]), abs=1e-4)
    tokens = [document["tokens"] for document in plan.calibration["documents"]]
    assert all(0.7 * (ends[1] - TAIL) < n <= ends[1] - TAIL for n in tokens[::2])
    assert all(0.7 * (ends[0] - TAIL) < n <= ends[0] - TAIL for n in tokens[1::2])


# interruptions


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, after, method):
    """Make a method of the search fail after some calls. Returns the list of calls."""
    calls, original = [], getattr(Search, method)

    def step(self, *arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise Interrupted
        return original(self, *arguments)

    monkeypatch.setattr(Search, method, step)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "after"),
    [("llama", "expected", 1), ("llama", "loss", 0), ("llama", "loss", 1), ("gemma3", "expected", 2)],
)
def test_an_interrupted_search_resumes(family, method, after, make, tmp_path, monkeypatch):
    model, file = tiny(family), tmp_path / "steps" / "search.json"
    expected = make(model=model, budget=0.5)
    with monkeypatch.context() as patched:
        interrupt(patched, after, method)
        with pytest.raises(Interrupted):
            make(model=model, budget=0.5, checkpoint=file)
    steps = json.loads(file.read_text())["steps"]
    assert steps
    assert steps[-1]["phase"] != "done"
    with monkeypatch.context() as patched:
        resumed = interrupt(patched, 1000, "expected")
        assert make(model=model, budget=0.5, checkpoint=file) == expected
    assert json.loads(file.read_text())["steps"][: len(steps)] == steps
    with monkeypatch.context() as patched:
        whole = interrupt(patched, 1000, "expected")
        make(model=model, budget=0.5)
    assert len(resumed) == len(whole) - sum(step["phase"] in ("forward", "refined") for step in steps)
    with monkeypatch.context() as patched:  # all steps are in the checkpoint: nothing is searched again
        interrupt(patched, 0, "expected")
        assert make(model=model, budget=0.5, checkpoint=file) == expected


@pytest.mark.slow
def test_a_checkpoint_of_other_arguments_is_ignored(make, tmp_path):
    file, once = tmp_path / "search.json", Method(steps=False)
    usual = {"model": tiny("gemma3"), "budget": 0.3, "context": LEAST_CONTEXT, "method": once}
    expected = make(**usual)
    for other in [
        {"model": tiny("gemma3", seed=1)},
        {"budget": 0.2},
        {"seed": 1},
        {"context": LEAST_CONTEXT + 10},
        {"method": replace(once, retrieval_weight=0.5)},
        {"method": replace(once, prefill_compression=True)},
    ]:
        make(**usual | other, checkpoint=file)
        steps = json.loads(file.read_text())["steps"]
        assert make(**usual, checkpoint=file) == expected
        assert json.loads(file.read_text())["steps"][: len(steps)] != steps


@pytest.mark.parametrize("content", ["", "nonsense", "[]", "{}", b"\xff\xfe"])
def test_a_broken_checkpoint_is_refused(content, make, tmp_path):
    file = tmp_path / "search.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HeadsinkError, match=r"search\.json: not a checkpoint of headsink; remove it") as error:
        make(checkpoint=file)
    assert "\n" not in str(error.value)
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())


@pytest.mark.slow
def test_broken_steps_of_the_same_arguments_are_refused(make, tmp_path):
    file = tmp_path / "search.json"
    make(checkpoint=file)
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"steps": [{"phase": "forward"}]}))
    with pytest.raises(HeadsinkError, match="not a checkpoint"):
        make(checkpoint=file)


# max_kl


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_max_kl_takes_the_smallest_budget_within_it(family, small, monkeypatch):
    calibration = Calibration(tiny(family), small, context=CONTEXT, method=Method(steps=False), progress=False)
    monkeypatch.setattr(calibration, "plan", cache(calibration.plan))
    plans = {budget: calibration.plan(budget) for budget in BUDGETS if budget * CONTEXT >= SINK + WINDOWS[0]}
    kl = {budget: plan.calibration["verified"]["kl_text"] for budget, plan in plans.items()}
    assert list(kl.values()) == sorted(kl.values(), reverse=True)  # else another budget within max_kl may be found
    limits = [(a + b) / 2 for a, b in itertools.pairwise(kl.values()) if a > b]
    for limit in [1e-9, *limits, 2 * max(kl.values())]:
        plan = calibration.plan_within(limit)
        expected = next(budget for budget in plans if kl[budget] <= limit or budget == 1)
        assert plan == plans[expected].model_copy(
            update={"calibration": plans[expected].calibration | {"max_kl": limit}}
        )


@pytest.mark.slow
def test_max_kl_of_calibrate(make):
    plan = make(max_kl=100.0)
    assert plan.calibration["max_kl"] == 100
    assert plan.calibration["budget"] == 0.075  # the smallest plan is 36 of 600 tokens
    assert plan.kv_budget(CONTEXT) <= 0.075


# arguments


def test_bad_arguments_are_named(make):
    model = tiny("llama")
    for options, message in [
        ({"budget": 0.5, "max_kl": 0.1}, "budget: give a budget or max_kl, one of the two"),
        ({"budget": None}, "budget: give a budget or max_kl, one of the two"),
        ({"budget": 0}, r"budget: 0 is outside \(0, 1\]"),
        ({"budget": 1.2}, r"budget: 1.2 is outside \(0, 1\]"),
        ({"budget": float("nan")}, "budget: nan is outside"),
        ({"budget": 0.05}, "budget: 0.05 of 600 tokens is less than the smallest plan, 0.060"),
        ({"max_kl": 0.0}, "max_kl: 0.0 is not above 0 nats"),
        ({"max_kl": float("nan")}, "max_kl: nan is not above 0 nats"),
        (
            {"context": LEAST_CONTEXT - 1},
            f"context: {LEAST_CONTEXT - 1} tokens are too few: .*; give {LEAST_CONTEXT} to 1024",
        ),
        ({"context": 1025}, f"context: 1025 is over the model's maximum of 1024 tokens; give {LEAST_CONTEXT} to 1024"),
        ({"context": (800, 700)}, "context: 800 to 700 is not a range; give the shorter length first"),
        ({"context": (700, 2000)}, "context: 2000 is over the model's maximum of 1024"),
        ({"quality_contexts": (300,)}, "quality_contexts: 300 tokens are too few: .*; give 512 to 1024"),
    ]:
        with pytest.raises(HeadsinkError, match=message) as error:
            make(model=model, **options)
        assert "\n" not in str(error.value)


def test_models_that_cannot_be_planned_are_refused(make):
    with pytest.raises(HeadsinkError, match="every layer of this model has a sliding window"):
        make("mistral-sliding")
    model = tiny("gemma2")
    model.config._attn_implementation = "sdpa"  # transformers 5.24 has none for Gemma 2, and its setter says so itself
    with pytest.raises(HeadsinkError, match=r"not with sdpa: call model.set_attn_implementation\('eager'\)"):
        make(model=model)


# documents


def test_plans_are_scored_on_other_text_and_other_questions(tokenizer):
    """No paragraph, no sentence of a needle and no question form is in documents of both halves."""

    def parts(documents):
        found, forms = set(), set()
        for document in documents:
            forms |= {question.form for question in document.questions}
            for ids in (document.ids, document.continuation, *(question.ids for question in document.questions)):
                found |= corpus.paragraphs(tokenizer.decode(ids))
        return found, forms

    made = [document for seed in range(2) for document in _documents(tokenizer, 1500, 3000, corpus.DOMAINS, seed)]
    judged = [
        probes.document(tokenizer, 2000, split="heldout", seed=seed, domains=(domain,))
        for seed in range(2)
        for domain in corpus.DOMAINS
    ]
    (text, forms), (other_text, other_forms) = parts(made), parts(judged)
    assert len(text) > 100 < len(other_text)
    assert not text & other_text
    assert forms == set(FORMS["calibration"])
    assert other_forms == set(FORMS["heldout"])
