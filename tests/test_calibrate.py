"""The choice under a budget, against all choices; errors, against the reference."""

import itertools

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from headsink import HeadsinkError, Pattern
from headsink.architecture import describe
from headsink.attention import engaged, observing
from headsink.calibrate import TAU, Errors, candidates, choose, pattern_errors
from headsink.pattern import FULL, reference_attention

PATTERNS = (Pattern(4, 0, 16), Pattern(4, 0, 40))


def random_errors(seed, layers=2, heads=2):
    generator = torch.Generator().manual_seed(seed)
    cost = (
        torch.rand(layers, heads, len(PATTERNS), generator=generator, dtype=torch.float64)
        .sort(-1, descending=True)
        .values
    )
    return Errors(PATTERNS, cost, torch.zeros_like(cost), torch.ones(layers, heads).double())


def total(errors, choice):
    options = (*errors.patterns, FULL)
    cost = torch.cat([errors.natural, torch.zeros(*errors.natural.shape[:2], 1)], -1)
    return sum(
        float(cost[layer, head, options.index(p)]) for layer, row in choice.items() for head, p in enumerate(row)
    )


@given(st.integers(0, 10_000), st.floats(0.25, 1))
@settings(max_examples=60, deadline=None)
def test_choice_fits_and_is_near_the_best(seed, budget):
    errors, context = random_errors(seed), 100
    choice = choose(errors, budget, context, 0.3)
    allowed = budget * context * 4
    assert sum(p.size(context) for row in choice.values() for p in row) <= allowed
    options, best = (*PATTERNS, FULL), float("inf")
    for row in itertools.product(options, repeat=4):
        if sum(p.size(context) for p in row) <= allowed:
            best = min(best, total(errors, {0: row[:2], 1: row[2:]}))
    assert total(errors, choice) <= best + float(errors.natural.max())  # at most one head worse than the best of all


def test_a_budget_of_one_keeps_everything():
    assert all(p.full for row in choose(random_errors(0), 1.0, 100, 0.3).values() for p in row)


def test_more_budget_is_never_worse():
    errors = random_errors(3, layers=6, heads=3)
    costs = [total(errors, choose(errors, budget, 200, 0.3)) for budget in (0.15, 0.2, 0.3, 0.5, 0.8, 1.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_a_budget_below_the_smallest_plan_is_refused():
    with pytest.raises(HeadsinkError, match="less than the smallest plan"):
        choose(random_errors(0), 0.01, 100, 0.3)


def test_layers_that_slide_get_no_pattern():
    errors = random_errors(0, layers=3)
    errors.natural[1] = float("nan")
    assert sorted(choose(errors, 0.5, 100, 0.3)) == [0, 2]


def test_candidates_are_smaller_than_the_text():
    assert all(p.size(300) < 300 and not p.full for p in candidates(300))
    assert len(candidates(8192)) > len(candidates(300)) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_reference(family):
    """|W_O (o_full - o_pattern)|^2 / |W_O o_full|^2 of the layer, o_pattern by the definition."""
    model, found = tiny(family), []
    with engaged(model), observing(found.append), torch.no_grad():
        model(torch.randint(3, 211, (1, 61)), use_cache=False)
    patterns, rows = (Pattern(2, 0, 9), Pattern(2, 4, 9), Pattern(1, 2, 0)), torch.tensor([20, 33, 60])
    shape = describe(model)
    for seen in found:
        if shape.windows[seen.layer]:
            continue
        errors, median = pattern_errors(seen, rows, patterns)
        w_o, group = seen.module.o_proj.weight.double(), shape.group * shape.head_dim
        full = seen.output[0].double().transpose(0, 1).flatten(1)[rows]
        norms = seen.value[0].norm(dim=-1).median(-1).values
        torch.testing.assert_close(median, norms.double(), rtol=1e-6, atol=0)
        for n, pattern in enumerate(patterns):
            lossy = reference_attention(
                seen.query, seen.key, seen.value, [pattern] * shape.kv_heads, TAU * norms, seen.scaling
            )
            moved = full - lossy[0].double().transpose(0, 1).flatten(1)[rows]
            for head in range(shape.kv_heads):
                columns = slice(head * group, (head + 1) * group)
                wrong = (moved[:, columns] @ w_o[:, columns].T).square().sum(-1)
                expected = (wrong / (full @ w_o.T).square().sum(-1)).mean()
                torch.testing.assert_close(errors[head, n], expected, rtol=1e-3, atol=1e-9)
