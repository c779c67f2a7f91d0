"""The choice of patterns under a budget against all choices, and the steps of the search."""

import itertools
import json
from dataclasses import asdict
from functools import cache

import pytest
import torch
from cached_documents import SOME, everything, make_cached_document
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from headsink import HeadsinkError, Pattern
from headsink.calibration import method as method_module
from headsink.calibration.method import POLICIES, SINK, Method
from headsink.calibration.search import START, Search, Step, choose
from headsink.eviction.pattern import FULL
from headsink.models.spec import attention_modules

CONTEXT = 190  # a document of the cached documents and the longest branch
SMALL = {"windows": (8, 32), "top_k": (0, 1 / 8)}  # two of the patterns have the same size
LEAST = Pattern(SINK, 0, 8)
ON_OFF = Pattern(4, 0, 24)
METHODS = (
    *(Method(policy=policy, **SMALL) for policy in POLICIES),
    *(Method(**{switch: False}, **SMALL) for switch in ("importance", "gradient", "steps", "correction", "refine")),
    Method(prefill_compression=True, **SMALL),
)


def name(method):
    off = [
        switch for switch in ("importance", "gradient", "steps", "correction", "refine") if not getattr(method, switch)
    ]
    return f"{method.policy}{' without ' if off else ''}{off[0] if off else ''}{' once' if method.prefill_compression else ''}"


every_method = pytest.mark.parametrize("method", METHODS, ids=name)
every_family = pytest.mark.parametrize("family", SOME)


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch):
    monkeypatch.setattr(method_module, "ON_OFF", (4, 0, 24))  # the default of 320 tokens exceeds these texts


@cache
def documents(family):
    model = tiny(family)
    return [make_cached_document(model, seed)[0] for seed in range(2)]


def needs(family, seed=0):
    """Return random importance of 100 keys, in each head higher than in the previous one."""
    shape = documents(family)[0].shape
    heads = shape.layers * shape.kv_heads
    importance = (
        torch.randn(heads, 100, generator=torch.Generator().manual_seed(seed)) + torch.arange(heads)[:, None] / 2
    )
    importance = importance.view(shape.layers, shape.kv_heads, -1) - 7
    importance[[window is not None for window in shape.windows]] = 0
    return importance


def searching(family, method, seed=0):
    return Search(documents(family), CONTEXT, method, seed, needs(family))


def run(family, method, budget, seed=0):
    """Return all steps of a search; fails if it does not end."""
    steps = []

    def report(step):
        steps.append(step)
        assert len(steps) < 60

    last = searching(family, method, seed).run(budget, report=report)
    assert last == steps[-1]
    return steps


def heads(step):
    return [pattern for row in step.plan() if row is not None for pattern in row]


def kept(step):
    return sum(pattern.size(CONTEXT) for pattern in heads(step)) / (CONTEXT * len(heads(step)))


# the choice

SIZES = torch.tensor([20, 44, 100], dtype=torch.float64)


def random_costs(seed, rows=4):
    """Return random costs: larger patterns mostly cost less."""
    cost = torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return cost.sort(-1, descending=True).values if seed % 2 else cost - 0.3


def total(cost, pick):
    return float(cost.gather(1, torch.as_tensor(pick)[:, None]).sum())


@given(st.integers(0, 10_000), st.floats(0.2, 1))
@settings(max_examples=60, deadline=None)
def test_the_choice_fits_and_is_close_to_the_best(seed, budget):
    cost, allowed = random_costs(seed), budget * 400
    pick = choose(cost, SIZES, allowed)
    assert float(SIZES[pick].sum()) <= allowed
    best = min(
        total(cost, other) for other in itertools.product(range(3), repeat=4) if SIZES[list(other)].sum() <= allowed
    )
    worst_head = float((cost.max(1).values - cost.min(1).values).max())
    assert best - 1e-12 <= total(cost, pick) <= best + worst_head  # at most one head worse than the best of all


@pytest.mark.slow
def test_with_enough_budget_every_row_takes_its_best():
    for seed in range(10):
        cost = random_costs(seed, rows=20)
        assert torch.equal(choose(cost, SIZES, 20 * 100), cost.argmin(1))


def test_more_budget_is_never_worse():
    cost = random_costs(3, rows=18)
    costs = [total(cost, choose(cost, SIZES, share * 1800)) for share in (0.2, 0.25, 0.3, 0.5, 0.8, 1.0)]
    assert costs == sorted(costs, reverse=True)


def test_options_of_infinite_cost_are_not_chosen():
    cost = random_costs(1, rows=6)
    cost[2, 0] = cost[4, :2] = float("inf")
    for allowed in (244, 300, 400, 600):
        pick = choose(cost, SIZES, allowed)
        assert float(SIZES[pick].sum()) <= allowed
        assert torch.isfinite(cost.gather(1, pick[:, None])).all()


def test_an_impossible_budget_is_refused():
    with pytest.raises(HeadsinkError, match="budget: 79 keys are less than the smallest plan, 80"):
        choose(random_costs(1), SIZES, 79)


# the search


@pytest.mark.slow
@every_family
@every_method
def test_every_step_is_within_the_budget_and_reports_its_cost(family, method, case_seed):
    budgets = (0.3, 0.55, 0.9)
    for budget in {budgets[case_seed % 3], budgets[case_seed // 3 % 3]}:
        steps, made = run(family, method, budget), searching(family, method)
        assert [step.phase for step in steps] == sorted(
            (step.phase for step in steps), key=["forward", "refined", "done"].index
        )
        assert steps[-1].phase == "done"
        for step in steps:
            assert step.kept == pytest.approx(kept(step))
            assert step.kept <= budget + 1e-9
            sliding = [window is not None for window in documents(family)[0].shape.windows]
            assert [row is None for row in step.plan()] == sliding
        loss = sum(float(r.loss(r.log_probs(steps[-1].plan()), method.retrieval_weight)) for r in made.cached) / 2
        assert steps[-1].loss == pytest.approx(loss, abs=1e-6)
        if method.policy != "streaming-llm":
            assert {pattern for step in steps for pattern in heads(step)} <= set(method.options(CONTEXT))


@pytest.mark.slow
def test_patterns_of_baseline_policies():
    for budget in (0.3, 0.55, 0.9):
        for family in SOME:
            shared = run(family, Method(policy="streaming-llm"), budget)[-1]
            assert set(heads(shared)) == {Pattern(SINK, 0, int(budget * CONTEXT) - SINK)}
            for policy in ("on-off", "layer-wise", "copy-first-layer", "random"):
                step = run(family, Method(policy=policy), budget)[-1]
                assert set(heads(step)) <= {ON_OFF, FULL}
                if policy == "layer-wise":
                    assert all(len(set(row)) == 1 for row in step.plan() if row is not None)


@every_family
def test_layers_become_full_one_by_one(family):
    """A layer needs more keys than a step adds: the search must still continue, and end."""
    layers = sum(window is None for window in documents(family)[0].shape.windows)
    one = (1 + (layers - 1) * ON_OFF.size(CONTEXT) / CONTEXT) / layers
    found = run(family, Method(policy="layer-wise"), one + 0.01)[-1]
    assert sum(row[0].full for row in found.plan() if row is not None) == 1


@every_family
def test_random_allocation_is_repeatable_and_grows_with_the_budget(family):
    method, before = Method(policy="random"), None
    for budget in (0.3, 0.5, 0.7, 0.9, 1.0):
        found = run(family, method, budget, seed=5)[-1]
        assert found == run(family, method, budget, seed=5)[-1]
        full = {n for n, pattern in enumerate(heads(found)) if pattern.full}
        assert before is None or before <= full
        before = full
    drawn = {tuple(heads(run("llama-mha", method, 0.5, seed)[-1])) for seed in range(8)}
    assert len(drawn) > 4


@every_family
@every_method
def test_the_whole_budget_keeps_everything(family, method):
    last = run(family, method, 1.0)[-1]
    assert all(pattern.full for pattern in heads(last))
    assert last.kept == 1
    assert last.loss == pytest.approx(0, abs=1e-6)


@every_method
def test_a_budget_below_the_smallest_plan_is_refused(method):
    why = "leaves no window" if method.policy == "streaming-llm" else "less than the smallest plan"
    with pytest.raises(HeadsinkError, match=f"budget: .*{why}"):
        run("llama", method, 0.02)


def test_the_smallest_plan_is_accepted():
    found = run("llama", Method(**SMALL), LEAST.size(CONTEXT) / CONTEXT)
    assert set(heads(found[-1])) == {LEAST}


def test_an_unknown_policy_is_refused():
    with pytest.raises(HeadsinkError, match="policy: 'best' is unknown; one of headsink, "):
        Method(policy="best")


def test_options_are_every_window_with_every_share_of_top_k_keys():
    top_k = [pattern.top_k for pattern in Method().options(8192)[:-1]]
    assert top_k == [0, 64, 128, 256, 512, 1024, 2048, 4096]
    assert Method(**SMALL).options(CONTEXT) == (
        *(Pattern(4, top_k, window) for top_k in (0, 24) for window in (8, 32)),
        FULL,
    )


def test_options_are_distinct_and_smaller_than_the_text():
    assert Method().options(40) == (Pattern(4, 0, 32), Pattern(4, 1, 32), Pattern(4, 2, 32), FULL)
    assert Method().options(36) == (FULL,)


# starts


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", [0.2, 0.35, 0.5, 0.8])
def test_a_search_starts_from_importance(family, budget):
    """Heads get the most important keys of all within a share of the budget, close to the optimum."""
    made = searching(family, Method(**SMALL))
    start, importance = made._start(budget), needs(family)[made.layers].flatten(0, 1)
    least = LEAST.size(CONTEXT) / CONTEXT
    most = importance.flatten().sort(descending=True).values[: round((START * budget - least) * importance.numel())]
    wanted = CONTEXT * (least + (importance >= most[-1]).double().mean(1))
    every = torch.cartesian_prod(*[torch.arange(len(made.options))] * len(start))
    every = every[made.sizes[every].sum(1) <= START * budget * CONTEXT * len(start)]
    missing = [(wanted - made.sizes[pick]).clamp(min=0) for pick in (every, start)]
    best, found = (float((keys.square() / wanted).sum(-1).min()) for keys in missing)
    assert best - 1e-9 <= found <= 1.05 * best
    assert made.kv_budget(start) <= START * budget
    first = run(family, Method(**SMALL), budget)[0]
    assert all(option <= p.size(CONTEXT) for option, p in zip(made.sizes[start].tolist(), heads(first), strict=True))


def test_a_share_of_the_budget_is_allocated_by_importance():
    made = searching("llama", Method(windows=(8,), top_k=(0, 0.5)))
    made.importance = torch.arange(600.0).view(3, 2, 100)
    assert made.sizes.tolist() == [12, 107, 190]
    for share, expected in [(0.4, [0, 0, 0, 0, 2, 2]), (0.31, [0, 0, 0, 0, 1, 2]), (0.2, [0, 0, 0, 0, 0, 1])]:
        assert made._start(share / START).tolist() == expected


@every_family
def test_without_importance_a_search_starts_from_the_smallest_plan(family):
    smallest = [0] * len(searching(family, Method(**SMALL)).heads)
    assert searching(family, Method(importance=False, **SMALL))._start(0.8).tolist() == smallest
    assert Search(documents(family), CONTEXT, Method(**SMALL))._start(0.8).tolist() == smallest
    for policy in ("on-off", "layer-wise"):
        assert searching(family, Method(policy=policy))._start(0.8).tolist() == smallest
    for share in (START, 0.99):
        budget = share / START * LEAST.size(CONTEXT) / CONTEXT
        assert searching(family, Method(**SMALL))._start(budget).tolist() == smallest


@every_family
def test_the_first_layer_is_copied_to_all(family):
    """With one full head per layer, it is the most important head of the first layer."""
    most = (FULL.size(CONTEXT) + (documents(family)[0].shape.kv_heads - 1) * ON_OFF.size(CONTEXT)) / CONTEXT
    budget = most / documents(family)[0].shape.kv_heads + 0.01
    rows = [row for row in run(family, Method(policy="copy-first-layer"), budget)[-1].plan() if row is not None]
    assert all(row == rows[0] for row in rows)
    full = everything(documents(family)[0].shape)
    error = sum(r.marginals(full, [ON_OFF], 0.0).error for r in documents(family))[full.index(full[-1])]
    assert [pattern.full for pattern in rows[0]] == [n == int(error[:, 0].argmax()) for n in range(len(rows[0]))]


def test_a_plan_for_prefill_compression_is_scored_with_it():
    pick = torch.zeros(6, dtype=torch.long)
    let_go = searching("llama", Method(**SMALL)).loss(pick)
    held = [make_cached_document(tiny("llama"), seed, freeze=True)[0] for seed in range(2)]
    expected = sum(float(r.loss(r.log_probs([[LEAST] * 2] * 3), 0.25)) for r in held) / 2
    assert searching("llama", Method(prefill_compression=True, **SMALL)).loss(pick) == pytest.approx(expected)
    assert abs(expected - let_go) > 0.01 * let_go


# steps


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("policy", ["headsink", "on-off", "layer-wise"])
def test_in_forward_steps_no_head_loses_keys(family, policy):
    """Each step reports the loss of the plan before it."""
    method = Method(policy=policy, importance=False, **SMALL)
    steps, made = [s for s in run(family, method, 0.8) if s.phase == "forward"], searching(family, method)
    assert len(steps) >= (1 if policy == "layer-wise" else 2)
    for before, after in itertools.pairwise(steps):
        pairs = list(zip(heads(before), heads(after), strict=True))
        assert all(a.size(CONTEXT) <= b.size(CONTEXT) for a, b in pairs)
        assert before.kept < after.kept
        assert after.loss == pytest.approx(made.loss(made._pick(before)), abs=1e-6)


@pytest.mark.slow
@every_family
def test_swaps_never_raise_the_loss(family):
    swapped = False
    for budget in (0.25, 0.35, 0.45, 0.6, 0.75):
        without = run(family, Method(refine=False, **SMALL), budget)
        found = run(family, Method(**SMALL), budget)
        forward = [step for step in found if step.phase == "forward"]
        assert forward == without[:-1]
        losses = [without[-1].loss, *(step.loss for step in found if step.phase == "refined")]
        assert losses == sorted(set(losses), reverse=True)
        assert found[-1].loss == losses[-1]
        swapped |= len(losses) > 1
    assert swapped


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("policy", POLICIES)
def test_a_search_resumes_from_any_step(family, policy):
    method = Method(policy=policy, **SMALL)
    steps = run(family, method, 0.35)
    written = json.dumps([asdict(step) for step in steps])
    for done in range(len(steps) + 1):
        rest, read = [], [Step(**step) for step in json.loads(written)[:done]]
        last = searching(family, method).run(0.35, read, rest.append)
        assert last.plan() == steps[-1].plan()
        assert last.loss == pytest.approx(steps[-1].loss)
        if policy in ("headsink", "on-off", "layer-wise"):
            assert rest == steps[done:]


def test_keys_go_to_the_head_that_matters():
    """Only one head of this model has output: it gets all keys, and the others get the minimum."""
    for layer, head in [(0, 1), (1, 0), (2, 1)]:
        model = tiny("llama")
        with torch.no_grad():
            for n, module in enumerate(attention_modules(model)):
                columns = module.o_proj.weight.unflatten(1, (2, -1))
                columns[:, [h for h in range(2) if (n, h) != (layer, head)]] = 0
        found = Search([make_cached_document(model)[0]], CONTEXT, Method(**SMALL)).run(0.5)
        assert found.plan() == [[FULL if (n, h) == (layer, head) else LEAST for h in range(2)] for n in range(3)]
        assert found.loss == pytest.approx(0, abs=1e-6)


def test_expected_gains_sum_to_the_loss():
    """Slopes that overestimate the gain are corrected by errors, so that the expected loss with full heads is 0."""
    corrected = 0
    for family, seed in itertools.product(SOME, range(3)):
        made, plain, outputs = (
            searching(family, Method(**switch, **SMALL)) for switch in ({}, {"correction": False}, {"gradient": False})
        )
        pick = torch.randint(len(made.options), (len(made.heads),), generator=torch.Generator().manual_seed(seed))
        (loss, cost), (_, slopes), (_, errors) = (s.expected(pick) for s in (made, plain, outputs))
        found = [r.marginals(made.patterns(pick), made.options, made.method.retrieval_weight) for r in made.cached]
        for mean, parts in ((slopes, [m.gradient for m in found]), (errors, [m.error for m in found])):
            expected = (parts[0] + parts[1]).double()[made.layers].flatten(0, 1) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-9)
        assert loss == pytest.approx(made.loss(pick), abs=1e-6)
        assert torch.equal(cost.gather(1, pick[:, None]), torch.zeros(len(pick), 1).double())
        promised = float(slopes[:, -1].sum())
        factor = max(0.0, -loss - promised) / float(errors[:, -1].sum())
        torch.testing.assert_close(cost, slopes + factor * errors, rtol=1e-6, atol=1e-12)
        if promised < -loss:
            corrected += 1
            assert float(cost[:, -1].sum()) == pytest.approx(-loss, rel=1e-6)
    assert corrected


def test_ranks_get_the_same_budgets():
    """The n-th most important heads of all ranks keep the same number of keys, so no rank has a larger cache."""
    differ = 0
    for policy, budget in itertools.product(("headsink", "on-off"), (0.35, 0.55, 0.8)):
        made = searching("llama-mha", Method(policy=policy, ranks=2, **SMALL))
        importance = needs("llama-mha").mean(-1)
        for step in run("llama-mha", made.method, budget):
            assert step.kept == pytest.approx(kept(step))
            assert step.kept <= budget + 1e-9
            for layer, row in enumerate(step.plan()):
                ranks = [sorted(heads, key=lambda head: -importance[layer, head]) for heads in ([0, 1], [2, 3])]
                for one, other in zip(*ranks, strict=True):
                    assert row[one] == row[other]
                differ += row[ranks[0][0]] != row[ranks[0][1]]
    assert differ


def test_with_more_ranks_than_heads_a_layer_has_one_size():
    for row in run("llama", Method(ranks=4, **SMALL), 0.55)[-1].plan():
        assert row[0] == row[1]


def test_ranks_that_cannot_be_balanced_are_refused():
    with pytest.raises(HeadsinkError, match="tensor-parallel: 4 KV heads cannot be split evenly over 3 ranks"):
        searching("llama-mha", Method(ranks=3, **SMALL))
    for wrong in (
        {"ranks": 0},
        {"ranks": 2, "policy": "random"},
        {"ranks": 2, "prefill_compression": True, "reconstruct": True},
    ):
        with pytest.raises(HeadsinkError, match=f"tensor-parallel: {wrong['ranks']} ranks; at least 1"):
            Method(**wrong)
