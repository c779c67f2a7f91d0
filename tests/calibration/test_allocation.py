"""Allocation of a KV budget to heads: by importance, and by local search on a loss."""

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from headsink.calibration.allocation import (
    FACTORS,
    FEW,
    LEAST,
    NONE,
    SWEEPS,
    allocate,
    coordinate_descent,
    smallest,
    transfer,
)
from headsink.eviction.pattern import Pattern

some_shares = st.lists(st.floats(0, 1), min_size=2, max_size=8).map(lambda x: torch.tensor(x, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.03, 0.25, 0.7, 1.0])
def test_allocation_keeps_the_most_important_keys_of_all_heads(share):
    importance = torch.randn(3, 2, 101, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [3.0]])
    found = allocate(importance, share)
    ranks = importance.flatten().argsort(descending=True).argsort().view(importance.shape)  # 0 for the most important
    stay = ranks < importance.numel() - 1 - int((1 - share) * (importance.numel() - 1))
    assert torch.equal(found, stay.double().mean(-1))
    assert found.mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("share", "floor"), [(0.25, 0.05), (0.03, 0.02), (0.03, 0.5)])
def test_every_head_has_its_floor(share, floor):
    spread = torch.linspace(0, 8, 6).view(3, 2, 1)  # of six heads, the last ones have all of the most important keys
    importance = torch.randn(3, 2, 1000, generator=torch.Generator().manual_seed(1)) + spread
    found, free, least = allocate(importance, share, floor), allocate(importance, share), min(floor, share / 2)
    assert found.mean() == pytest.approx(share, abs=0.001)
    assert found.min() == pytest.approx(least, abs=0.001)
    assert free.min() == 0
    above = found > least + 0.001  # these compete as before, for what is left
    assert torch.equal(found[above].argsort(), free[above].argsort())


@pytest.mark.parametrize(("keys", "window"), [(0, 8), (60, 10), (109, 18), (200, 32), (5000, 32)])
def test_the_window_of_a_small_plan_is_a_part_of_its_keys(keys, window):
    assert smallest(keys) == Pattern(4, 0, window)


@example(torch.tensor([0.5, 2.2251e-309], dtype=torch.float64), 0, 0.0)  # division by it is not finite
@given(some_shares, st.integers(0, 7), st.sampled_from(FACTORS))
def test_a_move_changes_one_head_and_scales_the_others(shares, head, factor):
    head %= len(shares)
    assume(shares.mean() > 0.01)
    found = transfer(shares, head, factor)
    own = min(1.0, factor * max(float(shares[head]), LEAST * float(shares.mean())))
    rest = [n for n in range(len(shares)) if n != head]
    if found is None:
        left = float(shares.sum()) - own
        assert left < 0 or left > int((shares[rest] >= NONE).sum())
        return
    assert float(found[head]) == pytest.approx(own)
    assert float(found.sum()) == pytest.approx(float(shares.sum()))
    assert found.min() >= 0
    assert found.max() <= 1
    partly = [n for n in rest if shares[n] > 1e-6 and found[n] < 1 - 1e-9]
    ratios = found[partly] / shares[partly]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-5, atol=1e-9)
    assert all(shares[n] * ratios[0] >= 1 - 1e-6 for n in rest if found[n] >= 1 - 1e-9 and partly)


def make_shares(*shares):
    return torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_local_search_finds_the_minimum_of_the_loss(seed):
    """Each head's loss falls with its keys, at different rates: the best shares are known in closed form."""
    weights = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(1.5).exp()
    best = weights.sqrt() / weights.sqrt().sum() * 0.8
    start, calls, steps = make_shares(0.2, 0.2, 0.2, 0.2), [], []

    def loss(shares):
        assert float(shares.sum()) == pytest.approx(0.8)
        calls.append(float((weights / (shares + 1e-3)).sum()))
        return calls[-1]

    found = coordinate_descent(start, loss, lambda reached, low: steps.append((reached, low)))
    low, least, first = loss(found), loss(best), calls[0]
    assert low == min(calls[:-2])
    assert low - least < 0.1 * (first - least) + 0.02 * least
    assert len(calls) <= 1 + SWEEPS * 4 * len(FACTORS) + 2
    assert torch.equal(steps[-1][0], found)
    assert [low for _, low in steps] == sorted((low for _, low in steps), reverse=True)


def test_optimal_budgets_are_unchanged():
    start = make_shares(0.3, 0.1, 0.2)
    found = coordinate_descent(start, lambda shares: float((shares - start).abs().sum()), lambda reached, low: None)
    assert torch.equal(found, start)
    assert len(start) <= FEW
