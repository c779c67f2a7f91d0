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
from headsink.calibration import allocation
from headsink.calibration import calibrate as calibrate_module
from headsink.calibration.allocation import FLOOR, smallest
from headsink.calibration.cached_document import CachedDocument, mean_loss
from headsink.calibration.calibrate import BUDGETS, TAIL, Calibration, _documents, default_quality_contexts
from headsink.calibration.checkpoint import Step
from headsink.calibration.method import POLICIES, Method
from headsink.calibration.policies import choose_patterns
from headsink.calibration.score_fit import ScorerFit, measure_importance
from headsink.compression.reconstruction import prompt_tokens
from headsink.data import corpus
from headsink.data import documents as probes
from headsink.data.documents import FORMS
from headsink.evaluation.options import LEAST_CONTEXT
from headsink.evaluation.quality import score
from headsink.eviction.pattern import FULL
from headsink.models.spec import describe

CONTEXT = 600
FAMILIES = ("llama", "gemma3", "gpt-oss")
WINDOWS = Method(top_k=False)


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


@pytest.fixture
def many_heads(monkeypatch):
    """Without coordinate descent, as for a model with many heads."""
    monkeypatch.setattr(calibrate_module, "FEW", 0)


# end to end


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_meets_its_budget_and_records_its_calibration(family, make, small, many_heads):
    model = tiny(family, dtype=torch.float64)
    shape = describe(model)
    plan = make(model=model, budget=0.4, seed=3)
    plan.check(model)
    assert [layer is None for layer in plan.layers] == [window is not None for window in shape.windows]
    assert 0.39 < plan.kv_budget(CONTEXT) <= 0.4
    made = plan.calibration
    assert (made["budget"], made["context"], made["seed"]) == (0.4, [CONTEXT, CONTEXT], 3)
    assert made["domains"] == list(corpus.DOMAINS)
    assert made["kept"] == pytest.approx(plan.kv_budget(CONTEXT), abs=1e-4)
    assert made["dtype"] == "float64"
    assert made["method"] == asdict(Method())
    assert made["criterion"] is made["next_smaller"] is None
    assert made["forms"] == list(FORMS["calibration"])
    assert [document["text"] for document in made["documents"]] == list(corpus.DOMAINS)
    assert all(0.7 * (CONTEXT - TAIL) < d["tokens"] <= CONTEXT - TAIL for d in made["documents"])
    assert plan.quality == ()
    assert plan.reconstruction_prompt == tuple(small("\n\nRepeat the previous context exactly.\n\n")["input_ids"])
    assert Plan.model_validate_json(plan.to_json()) == Plan.model_validate(json.loads(plan.to_json()))

    # The verified quality is that of running the plan on the same documents.
    documents = _documents(small, CONTEXT, CONTEXT, corpus.DOMAINS, 3)
    scored = [score(model, [plan], document)[0] for document in documents]
    text = sum(float(continuations[0].kl.mean()) for continuations in scored) / len(scored)
    assert made["verified"]["kl_text"] == pytest.approx(text, abs=2e-5)
    assert made["verified"]["asked"] == sum(len(continuations) - 1 for continuations in scored)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_heads_compete_for_keys_by_importance(family, small, many_heads):
    model = tiny(family)
    calibration = Calibration(model, small, context=CONTEXT, progress=False)
    planned = [layer for layer, own in enumerate(calibration.planned) if own]
    importance = calibration.importance[planned].flatten(0, 1)
    for budget in (0.2, 0.4):
        plan = calibration.plan(budget)
        # The least important kept key of any head is more important than the most important evicted key of another, but for
        # the keys that every head has.
        rows = [head.pattern for layer in planned for head in plan.layers[layer]]
        least = smallest(int(budget * CONTEXT))
        assert all(pattern.full or (pattern.sink, pattern.window) == (least.sink, least.window) for pattern in rows)
        assert all(pattern.full or pattern.top_k >= FLOOR - 1 for pattern in rows)
        edges = []
        for pattern, own in zip(rows, importance, strict=True):
            if not pattern.full and pattern.top_k > FLOOR + 1:
                order = own.sort(descending=True).values
                place = round(pattern.top_k / CONTEXT * len(order))
                edges += [(order[max(place - 3, 0)], order[min(place + 3, len(order) - 1)])]
        assert max(low for _, low in edges) <= min(high for high, _ in edges)
    with pytest.raises(HeadsinkError, match=r"budget: 0.01 of 600 tokens is less than the smallest plan, 0.020"):
        calibration.plan(0.01)


@pytest.mark.slow
def test_scores_come_from_context_reconstruction_one_document_at_a_time(small, many_heads):
    model = tiny("llama")
    calibration = Calibration(model, small, context=CONTEXT, progress=False)
    fit, found = ScorerFit(describe(model)), []
    for document in calibration.documents:
        cached = CachedDocument(model, document)
        found.append(measure_importance(cached, prompt_tokens(small)))
        fit.add(cached, found[-1])
    assert torch.equal(calibration.weights, fit.weights())
    assert torch.equal(calibration.importance, torch.cat([one.attention for one in found], -1))
    assert calibration.cached == []  # their keys and values are freed
    top_k = torch.tensor([[h.top_k > 0 for h in row] for row in calibration.plan(0.4).layers])
    stored = torch.stack([calibration.plan(0.4).scores(layer) for layer in range(3)])
    torch.testing.assert_close(stored, calibration.weights * top_k[..., None], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_without_importance_heads_have_equal_budgets(make):
    plan = make("gemma3", budget=0.3, method=Method(importance=False))
    assert list(plan.counts()) == ["4+146k+30"]  # 30 % of 600 tokens; the window is a sixth of that


@pytest.mark.slow
def test_windows_are_chosen_by_squared_errors(small):
    model = tiny("gemma3")
    calibration = Calibration(model, small, context=CONTEXT, method=WINDOWS, progress=False)
    options = (Pattern(4, 0, 32), Pattern(4, 0, 128), Pattern(4, 0, 512), FULL)
    errors = sum(CachedDocument(model, document).squared_errors(options) for document in calibration.documents) / 4
    torch.testing.assert_close(calibration.errors, errors)
    assert calibration.weights is calibration.importance is None
    expected = choose_patterns(WINDOWS, calibration.planned, errors, CONTEXT, 0.5)
    assert patterns(calibration.plan(0.5)) == [row and list(row) for row in expected]


@pytest.mark.slow
def test_budgets_of_few_heads_are_tuned_on_the_measured_loss(small, tmp_path, monkeypatch):
    """Not worse on the documents than allocation by importance; resumes if stopped."""
    model, file = tiny("gemma3"), tmp_path / "steps" / "steps.json"
    monkeypatch.setattr(allocation, "SWEEPS", 1)
    calibration = Calibration(model, small, context=LEAST_CONTEXT, checkpoint=file, progress=False)
    plan = calibration.plan(0.3)
    steps = json.loads(file.read_text())["steps"]
    step = Step(**steps["0.3"])
    assert step.done
    assert 0.28 < plan.kv_budget(LEAST_CONTEXT) <= 0.3
    assert step.loss == pytest.approx(mean_loss(calibration.cached, patterns(plan)), rel=1e-5)
    monkeypatch.setattr(calibrate_module, "coordinate_descent", lambda allocation, loss, report: allocation)
    assert calibration.plan(0.3) == plan  # from the checkpoint
    by_importance = replace_step(calibration, file, None).plan(0.3)
    assert step.loss < mean_loss(calibration.cached, patterns(by_importance))
    begun = replace_step(calibration, file, replace(step, done=False))
    assert begun.plan(0.3).layers == plan.layers  # descent goes on from there
    assert json.loads(file.read_text())["steps"]["0.3"]["done"]


def replace_step(calibration, file, step):
    """Return the calibration with another step in its checkpoint."""
    key = json.loads(file.read_text())["key"]
    file.write_text(json.dumps({"key": key, "steps": {} if step is None else {"0.3": asdict(step)}}))
    calibration.checkpoint = calibrate_module.Checkpoint(file, key)
    return calibration


@pytest.mark.slow
def test_plans_are_repeatable(make):
    model = tiny("llama")
    options = {"model": model, "method": WINDOWS}
    assert make(**options) == make(**options)
    assert make(**options).calibration != make(**options, seed=1).calibration


@pytest.mark.slow
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "headsink"])
def test_every_policy_makes_plans_that_run(policy, make):
    model, budget = tiny("gemma3"), 0.75  # a streaming head of on-off keeps 320 of 600 tokens
    plan = make(model=model, budget=budget, method=Method(policy=policy))
    assert 0.5 < plan.kv_budget(CONTEXT) <= budget
    assert plan.calibration["method"]["policy"] == policy
    with headsink.apply(model, plan), torch.no_grad():
        assert torch.isfinite(model(torch.randint(3, 211, (1, 580))).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_budget_1_gives_the_models_outputs(family, make):
    plan = make(model=tiny(family, dtype=torch.float64), budget=1.0)
    assert all(pattern == FULL for row in patterns(plan) if row for pattern in row)
    verified = plan.calibration["verified"]
    assert max(abs(verified[name]) for name in ("kl_text", "kl_answers", "delta_nll")) < 1e-5
    assert verified["right_both"] == verified["right_full"]


@pytest.mark.slow
def test_plans_of_long_contexts_run_over_fewer_documents(make, monkeypatch):
    for tokens, number in ((8000, 4), (2 * CONTEXT, 2), (1, 1)):
        monkeypatch.setattr(calibrate_module, "VERIFIED", tokens)
        plan = make(budget=0.5, method=Method(policy="streaming-llm"))
        assert [one["verified"] for one in plan.calibration["documents"]] == [n < number for n in range(4)]


@pytest.mark.slow
def test_quality_is_measured_at_the_given_contexts(make):
    for contexts in [(600, 512), ()]:
        assert [q.context for q in make("gemma3", quality_contexts=contexts, method=WINDOWS).quality] == list(contexts)
    quality = make("gemma3", quality_contexts=None, context=1024, method=WINDOWS).quality
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
def test_the_budget_is_met_at_both_ends_of_a_range_of_contexts(make):
    model, ends = tiny("gemma3"), (LEAST_CONTEXT, 1000)
    plan = make(model=model, context=ends, budget=0.5, method=WINDOWS)
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


@pytest.mark.slow
def test_an_interrupted_descent_resumes(make, tmp_path, monkeypatch):
    file, original = tmp_path / "steps.json", calibrate_module.coordinate_descent

    def interrupted(shares, loss, report):
        def stop(reached, lowest):
            report(reached, lowest)
            raise Interrupted

        return original(shares, loss, stop)

    monkeypatch.setattr(calibrate_module, "coordinate_descent", interrupted)
    with pytest.raises(Interrupted):
        make("gemma3", checkpoint=file)
    step = Step(**json.loads(file.read_text())["steps"]["0.4"])
    assert not step.done
    starts = []

    def resumed(shares, loss, report):
        starts.append(shares)
        return shares

    monkeypatch.setattr(calibrate_module, "coordinate_descent", resumed)
    make("gemma3", checkpoint=file)
    assert starts[0].tolist() == step.shares
    for other in ({"seed": 1}, {"context": LEAST_CONTEXT}, {"budget": 0.3}):
        make(**{"family": "gemma3", "checkpoint": file} | other)  # starts again
        assert starts[-1].tolist() != step.shares


@pytest.mark.parametrize("content", ["", "nonsense", "[]", "{}", b"\xff\xfe"])
def test_a_broken_checkpoint_is_refused(content, make, tmp_path):
    file = tmp_path / "search.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HeadsinkError, match=r"search\.json: not a checkpoint of headsink; remove it") as error:
        make(checkpoint=file)
    assert "\n" not in str(error.value)
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())


@pytest.mark.slow
def test_broken_steps_of_the_same_arguments_are_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_module, "coordinate_descent", lambda allocation, loss, report: allocation)
    file = tmp_path / "search.json"
    make("gemma3", checkpoint=file)
    found = json.loads(file.read_text())
    for broken in ({"0.4": {"done": True}}, [1], {"0.4": 3}):
        file.write_text(json.dumps(found | {"steps": broken}))
        with pytest.raises(HeadsinkError, match="not a checkpoint"):
            make("gemma3", checkpoint=file)


# the smallest budget


@pytest.fixture(scope="module")
def calibration(small):
    """Windows of any budget, each calibrated once."""
    made = Calibration(tiny("llama"), small, context=CONTEXT, method=WINDOWS, progress=False)
    made.plan = cache(made.plan)
    return made


def without_reason(plan):
    return plan.calibration | {"criterion": None, "next_smaller": None}


@pytest.mark.slow
def test_max_kl_takes_the_smallest_budget_within_it(calibration):
    plans = {budget: calibration.plan(budget) for budget in BUDGETS if budget >= calibration.least}
    kl = {budget: plan.calibration["verified"]["kl_text"] for budget, plan in plans.items()}
    assert list(kl.values()) == sorted(kl.values(), reverse=True)  # else another budget within max_kl may be found
    limits = [(a + b) / 2 for a, b in itertools.pairwise(kl.values()) if a > b]
    for limit in [1e-9, *limits, 2 * max(kl.values())]:
        plan = calibration.plan_within(limit)
        expected = next(budget for budget in plans if kl[budget] <= limit or budget == 1)
        assert without_reason(plan) == plans[expected].calibration
        assert plan.layers == plans[expected].layers
        assert plan.calibration["criterion"] == {"max_kl": limit}
        smaller = max((budget for budget in plans if budget < expected), default=None)
        figures = None if smaller is None else {"budget": smaller} | plans[smaller].calibration["verified"]
        assert plan.calibration["next_smaller"] == figures


@pytest.mark.slow
@pytest.mark.parametrize("least", [0.0625, 0.1875, 0.75, 1.0])
def test_by_default_the_smallest_budget_without_visible_loss_is_taken(least, small, monkeypatch):
    """Smaller ones lose one answer, or more than a hundredth of a nat."""

    def verify(model, plan, full, shown):
        good = plan.kv_budget(CONTEXT) > least - 0.01
        figures = {"kl_text": 0.0, "kl_answers": 0.0, "asked": 9, "right_full": 8}
        return figures | ({"delta_nll": 0.01, "right_both": 8} if good else {"delta_nll": 0.02, "right_both": 7})

    monkeypatch.setattr(calibrate_module, "verify", verify)
    method = Method(policy="streaming-llm")
    plan = Calibration(tiny("llama"), small, context=CONTEXT, method=method, progress=False).plan_without_loss()
    assert plan.calibration["budget"] == least
    assert plan.calibration["criterion"] == {"delta_nll": 0.01, "answers": "all"}
    smaller = plan.calibration["next_smaller"]
    assert smaller is None if least == BUDGETS[0] else smaller["budget"] == BUDGETS[BUDGETS.index(least) - 1]


@pytest.mark.slow
def test_calibrate_finds_a_budget_and_says_why(make, capsys):
    for limit in ({"budget": None}, {"max_kl": 100.0}):
        plan = make(method=WINDOWS, progress=True, **limit)
        assert (
            plan.calibration["budget"] == 0.0625
        )  # the smallest plan is 36 of 600 tokens; no answer of this model is right
        assert f"{plan.calibration['budget']:.1%} of the KV cache is the smallest budget wit" in capsys.readouterr().err


# arguments


def test_bad_arguments_are_named(make):
    model = tiny("llama")
    for options, message in [
        ({"budget": 0.5, "max_kl": 0.1}, "budget: give a budget or max_kl, one of the two, or neither"),
        ({"budget": 0}, r"budget: 0 is outside \(0, 1\]"),
        ({"budget": 1.2}, r"budget: 1.2 is outside \(0, 1\]"),
        ({"budget": float("nan")}, "budget: nan is outside"),
        ({"budget": 0.01}, "budget: 0.01 of 600 tokens is less than the smallest plan, 0.020"),
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
