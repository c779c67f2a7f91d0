"""The choice of windows under a budget against all choices, and the shapes of policies."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headsink import HeadsinkError, Pattern
from headsink.calibration.knapsack import choose
from headsink.calibration.method import POLICIES, Method
from headsink.calibration.policies import ON_OFF, candidates, choose_patterns
from headsink.eviction.pattern import FULL

CONTEXT = 1000
PLANNED = (True, False, True, True)  # layers
KV_HEADS = 4
SIZES = torch.tensor([20, 44, 100], dtype=torch.float64)
WINDOWS = Method(top_k=False)
METHODS = (WINDOWS, *(Method(policy=policy) for policy in POLICIES if policy != "headsink"))
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.policy)


def errors(method, seed=0):
    """Return random errors, larger for smaller patterns, 0 for full attention."""
    count = len(candidates(method, CONTEXT))
    found = torch.rand(len(PLANNED), KV_HEADS, count, generator=torch.Generator().manual_seed(seed))
    found = found.sort(-1, descending=True).values
    found[..., -1] = 0
    return found


def chosen(method, budget, seed=0, drawn=0):
    return choose_patterns(method, PLANNED, errors(method, seed), CONTEXT, budget, drawn)


def heads(rows):
    return [pattern for row in rows if row is not None for pattern in row]


def kept(rows):
    return sum(pattern.size(CONTEXT) for pattern in heads(rows)) / (CONTEXT * len(heads(rows)))


# the knapsack


def random_costs(seed, rows=4):
    """Return random costs: larger patterns mostly cost less."""
    cost = torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return cost.sort(-1, descending=True).values if seed % 2 else cost - 0.3


def total(cost, pick):
    return float(cost.gather(1, torch.as_tensor(pick)[:, None]).sum())


@given(st.integers(0, 10_000), st.floats(0.2, 1))
@settings(max_examples=40)
def test_the_choice_fits_and_is_close_to_the_best(seed, budget):
    cost, allowed = random_costs(seed), budget * 400
    pick = choose(cost, SIZES, allowed)
    assert float(SIZES[pick].sum()) <= allowed
    best = min(
        total(cost, other) for other in itertools.product(range(3), repeat=4) if SIZES[list(other)].sum() <= allowed
    )
    worst_head = float((cost.max(1).values - cost.min(1).values).max())
    assert best - 1e-12 <= total(cost, pick) <= best + worst_head  # at most one head worse than the best of all


def test_with_enough_budget_every_row_takes_its_best():
    for seed in range(4):
        cost = random_costs(seed, rows=20)
        assert torch.equal(choose(cost, SIZES, 20 * 100), cost.argmin(1))


def test_more_budget_is_never_worse():
    cost = random_costs(3, rows=18)
    costs = [total(cost, choose(cost, SIZES, share * 1800)) for share in (0.2, 0.25, 0.3, 0.5, 0.8, 1.0)]
    assert costs == sorted(costs, reverse=True)


def test_an_impossible_budget_is_refused():
    with pytest.raises(HeadsinkError, match="budget: 79 keys are less than the smallest plan, 80"):
        choose(random_costs(1), SIZES, 79)


# policies


@every_method
@pytest.mark.parametrize("budget", [0.35, 0.55, 0.9])
def test_a_plan_is_within_the_budget_and_has_the_policys_patterns(method, budget):
    rows = chosen(method, budget)
    assert [row is None for row in rows] == [not own for own in PLANNED]
    assert 0.3 <= kept(rows) <= budget
    if method.policy == "streaming-llm":
        assert set(heads(rows)) == {Pattern(4, 0, int(budget * CONTEXT) - 4)}
    else:
        assert set(heads(rows)) <= set(candidates(method, CONTEXT))


@every_method
def test_the_whole_budget_keeps_everything(method):
    assert set(heads(chosen(method, 1.0))) == {FULL}


def test_candidates_are_distinct_and_smaller_than_the_text():
    assert candidates(WINDOWS, 8192) == (*(Pattern(4, 0, window) for window in (32, 128, 512, 2048)), FULL)
    assert candidates(WINDOWS, 516) == (Pattern(4, 0, 32), Pattern(4, 0, 128), FULL)
    assert candidates(Method(policy="random"), 600) == (Pattern(64, 0, 256), FULL)


def test_windows_in_cache_relative_positions_are_never_full():
    method = Method(policy="streaming-llm", positions="cache-relative")
    assert set(heads(chosen(method, 1.0))) == {Pattern(4, 0, CONTEXT - 4)}


def test_heads_with_the_largest_errors_are_full():
    method = Method(policy="on-off")
    found, errors_ = chosen(method, 0.5), errors(method)[list(PLANNED), :, 0].flatten()
    full = torch.tensor([pattern.full for pattern in heads(found)])
    count = int(full.sum())
    assert count == int((0.5 - 0.32) * 12 / (1 - 0.32))
    assert set(full.nonzero()[:, 0].tolist()) == set(errors_.topk(count).indices.tolist())


def test_layers_are_full_or_not():
    method = Method(policy="layer-wise")
    rows = chosen(method, 0.6)
    assert all(len(set(row)) == 1 for row in rows if row is not None)
    of_layer = errors(method)[..., 0].sum(-1).masked_fill(~torch.tensor(PLANNED), -1)
    assert [n for n, row in enumerate(rows) if row is not None and row[0].full] == [int(of_layer.argmax())]


def test_the_first_layer_is_copied_to_all():
    """The first planned layer's most important head is the full one in all layers, whatever their own errors are."""
    method = Method(policy="copy-first-layer")
    rows = [row for row in chosen(method, 0.5) if row is not None]
    assert all(row == rows[0] for row in rows)
    assert [pattern.full for pattern in rows[0]] == [
        n == int(errors(method)[0, :, 0].argmax()) for n in range(KV_HEADS)
    ]


def test_random_allocation_is_repeatable_and_grows_with_the_budget():
    method, before = Method(policy="random"), set()
    for budget in (0.4, 0.5, 0.7, 0.9):
        found = chosen(method, budget, drawn=5)
        assert found == chosen(method, budget, seed=1, drawn=5)  # errors do not matter
        full = {n for n, pattern in enumerate(heads(found)) if pattern.full}
        assert before <= full
        before = full
    assert len({tuple(heads(chosen(method, 0.5, drawn=seed))) for seed in range(8)}) > 4


@pytest.mark.parametrize("method", [Method(top_k=False, ranks=2), Method(policy="on-off", ranks=2)])
def test_ranks_get_the_same_budgets(method):
    """The n-th most important heads of all ranks keep the same number of keys, so no rank has a larger cache."""
    differ = 0
    for budget in (0.35, 0.55, 0.8):
        found = chosen(method, budget)
        assert kept(found) <= budget
        for layer, row in enumerate(found):
            if row is not None:
                worst = errors(method)[layer, :, 0]
                ranks = [sorted(own, key=lambda head: -worst[head]) for own in ([0, 1], [2, 3])]
                assert all(row[one] == row[other] for one, other in zip(*ranks, strict=True))
                differ += row[ranks[0][0]] != row[ranks[0][1]]
    assert differ


def test_with_more_ranks_than_heads_a_layer_is_as_with_one_head_a_rank():
    for row in chosen(Method(top_k=False, ranks=8), 0.55):
        assert row is None or len(set(row)) == 1


# methods


def test_an_unknown_policy_is_refused():
    with pytest.raises(HeadsinkError, match="policy: 'best' is unknown; one of headsink, "):
        Method(policy="best")


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"ranks": 2}, {"ranks": 2, "policy": "random"}])
def test_ranks_that_cannot_be_balanced_are_refused(wrong):
    with pytest.raises(HeadsinkError, match=f"tensor-parallel: {wrong['ranks']} ranks; at least 1"):
        Method(**wrong)


def test_cache_relative_positions_need_windows():
    with pytest.raises(HeadsinkError, match="positions: cache-relative positions need the policy streaming-llm"):
        Method(positions="cache-relative")
    assert Pattern(64, 0, 256) == ON_OFF
