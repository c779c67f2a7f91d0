"""The census in blocks equals the same statistics read off the whole attention matrix, key by key."""

import math

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from headsink.architecture import attention_modules, describe
from headsink.attention import engaged, observing
from headsink.census import statistics
from headsink.census.compare import rank_correlation
from headsink.census.roles import ROLES, role
from headsink.census.statistics import Thresholds, distances, first_row, layer_statistics
from headsink.census.transfer import conditional, pair_p_value, sentence, transfer
from headsink.pattern import Pattern, visible

LIMITS = Thresholds(first=2, floating=3, tau=0.8, window=9)
LENGTHS = [2, 7, 30, 61]


def whole_matrix(weights, seen, length):
    """The statistics of one layer at one length from its attention matrix [heads, N, N], one query at a time."""
    value, output = seen.value[0].double(), seen.output[0].double()
    weights, n_heads, group = weights.double(), weights.shape[0], weights.shape[0] // value.shape[0]
    norms, positions = value.norm(dim=-1), torch.arange(value.shape[1])
    short = norms.float() < LIMITS.tau * norms.float().median(-1, keepdim=True).values
    w_o = seen.module.o_proj.weight.double()
    rows = range(first_row(length), length)
    scores = {name: torch.zeros(n_heads, dtype=torch.float64) for name in statistics.SCORES}
    errors = {"first": torch.zeros(value.shape[0]).double(), "floating": torch.zeros(value.shape[0]).double()}
    profile = torch.zeros(n_heads, len(distances(weights.shape[1])), dtype=torch.float64)
    for h in range(n_heads):
        g, d = h // group, value.shape[2]
        for i in rows:
            p = weights[h, i]
            sink = visible(Pattern(LIMITS.first, LIMITS.floating, 0), positions[i : i + 1], positions, short[g])[0]
            near = (i - positions < LIMITS.window) & (positions <= i) & ~sink
            far = (positions <= i) & ~sink & ~near
            entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0)
            o = p @ value[g]
            mine = {
                "first": p[0],
                "sink": p[sink].sum(),
                "local": p[near].sum(),
                "far": p[far].sum(),
                "far_peak": p[far].max() if far.any() else 0.0,
                "entropy": entropy,
                "effective": math.exp(entropy),
                "output": (w_o[:, h * d : (h + 1) * d] @ o).norm() / (w_o @ output[:, i].flatten()).norm(),
            }
            for name, x in mine.items():
                scores[name][h] += x / len(rows)
            profile[h] += torch.stack(
                [p[max(0, i + 1 - int(s)) : i + 1].sum() for s in distances(weights.shape[1])]
            ) / len(rows)
        scores["legacy"][h] = weights[h, :length, 0].sum() / weights[h, :length].sum()
    for name, floats in (("first", 0), ("floating", LIMITS.floating)):
        for g in range(value.shape[0]):
            for i in rows:
                mask = visible(Pattern(LIMITS.first, floats, LIMITS.window), positions[i : i + 1], positions, short[g])[
                    0
                ]
                moved = []
                for h in range(g * group, (g + 1) * group):
                    p = weights[h, i] * mask
                    moved.append(output[h, i] - (p / p.sum()) @ value[g])
                columns = slice(g * group * value.shape[2], (g + 1) * group * value.shape[2])
                wrong = w_o[:, columns] @ torch.cat(moved)
                errors[name][g] += wrong.square().sum() / (w_o @ output[:, i].flatten()).square().sum() / len(rows)
    return scores, errors, weights[:, list(rows)].mean(1), profile


@pytest.mark.parametrize("family", FAMILIES)
def test_blockwise_equals_the_eager_matrix(family, monkeypatch):
    monkeypatch.setattr(statistics, "QUERY_BLOCK", 13)
    model, eager, ids = tiny(family), tiny(family, attention="eager"), torch.randint(3, 211, (1, 61))
    windows, found = describe(model).windows, []
    with torch.no_grad():
        matrices = eager(ids, output_attentions=True, use_cache=False).attentions
        with engaged(model), observing(found.append):
            model(ids, use_cache=False)
    assert [seen.layer for seen in found] == list(range(len(windows)))
    for seen, matrix in zip(found, matrices, strict=True):
        blockwise = layer_statistics(seen, LENGTHS, LIMITS, windows[seen.layer])
        for n, length in enumerate(LENGTHS):
            scores, errors, attention, profile = whole_matrix(matrix[0], seen, length)
            for name, expected in scores.items():
                torch.testing.assert_close(
                    blockwise.scores[name][n], expected, rtol=1e-5, atol=1e-5, msg=f"{name} at {length}"
                )
            for name, expected in errors.items():
                torch.testing.assert_close(
                    blockwise.errors[name][n], expected, rtol=1e-4, atol=1e-5, msg=f"{name} at {length}"
                )
            torch.testing.assert_close(blockwise.attention[n].double(), attention, rtol=0, atol=1e-5)
            torch.testing.assert_close(blockwise.profile[n], profile, rtol=0, atol=1e-5)
        if windows[seen.layer] is None:
            masses = sum(blockwise.scores[name] for name in ("sink", "local", "far"))
            torch.testing.assert_close(masses, torch.ones_like(masses))


def test_uniform_is_what_flat_attention_gives():
    """A model whose queries are zero attends flat: each score equals the uniform beside it."""
    model, found = tiny("llama"), []
    for module in attention_modules(model):
        torch.nn.init.zeros_(module.q_proj.weight)
    with engaged(model), observing(found.append), torch.no_grad():
        model(torch.randint(3, 211, (1, 61)), use_cache=False)
    for seen in found:
        result = layer_statistics(seen, LENGTHS, LIMITS)
        for name, flat in result.uniform.items():
            torch.testing.assert_close(result.scores[name], flat, rtol=1e-5, atol=1e-5, msg=name)


def test_the_legacy_score_calls_flat_attention_a_sink_on_short_text():
    """The design's own numbers: 0.75 at 2 tokens, 0.61 at 3."""
    flat = statistics._uniform(torch.zeros(1, 3, dtype=torch.bool), [2, 3], LIMITS, None)["legacy"]
    assert flat.flatten().tolist() == pytest.approx([0.75, 11 / 18])


@given(*[st.floats(0, 1)] * 4)
def test_every_head_has_a_role(sink, local, far, peak):
    total = (sink + local + far) or 1.0
    assert role(sink / total, local / total, far / total, peak * far / total) in ROLES


def test_roles_say_what_they_mean():
    assert role(0.9, 0.1, 0.0, 0.0) == "sink"
    assert role(0.1, 0.9, 0.0, 0.0) == "local"
    assert role(0.5, 0.5, 0.0, 0.0) == "mixed"
    assert role(0.2, 0.2, 0.6, 0.01) == "diffuse"
    assert role(0.2, 0.2, 0.6, 0.5) == "retrieval"


# the first question


def test_numbers_that_carry_over_are_found():
    sinks = torch.zeros(12, 9, dtype=torch.bool)
    sinks[:, :3] = True
    result = transfer(sinks, "made")
    assert result.pair_rate == result.first_rate == 1
    assert result.pair_chance == pytest.approx(1 / 3)
    assert result.pair_p < 0.001
    assert result.significant_pairs == result.testable_pairs == 66


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_chance_is_the_mean_of_the_shuffles(seed):
    generator = torch.Generator().manual_seed(seed)
    sinks = torch.rand(4, 7, generator=generator) < 0.5
    sinks[0, 0] = True
    result = transfer(sinks, "made", seed=seed)
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    trials = sum(int(sinks[a].sum()) for a, _ in pairs)
    assert result.pair_rate == pytest.approx(sum(int((sinks[a] & sinks[b]).sum()) for a, b in pairs) / trials)
    assert result.pair_chance == pytest.approx(
        sum(float(sinks[a].sum() * sinks[b].sum()) / 7 for a, b in pairs) / trials
    )
    assert 0 < result.pair_p <= 1


def test_p_values_are_even_when_nothing_carries_over():
    generator = torch.Generator().manual_seed(0)
    values = [transfer(torch.rand(6, 8, generator=generator) < 0.4, "made", seed=n).pair_p for n in range(60)]
    assert 0.25 < sum(p < 0.5 for p in values) / 60 < 0.75
    assert sum(p < 0.05 for p in values) < 10


def test_exact_pair_test():
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()
    assert pair_p_value(a, b) == pytest.approx(1 / 6)
    assert pair_p_value(a, ~b) == 1
    assert pair_p_value(a, torch.zeros(4).bool()) is None


def test_no_sinks_in_the_first_layer_predict_nothing():
    sinks = torch.rand(5, 6) < 0.5
    sinks[0] = False
    result = transfer(sinks, "made")
    assert result.first_rate is None
    assert "predicts nothing" in sentence(result)
    assert conditional(sinks)[0].isnan().all()


def test_rank_correlation_is_spearmans():
    a = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.ones(4)) is None
