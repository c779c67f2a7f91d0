"""Refitting equals ordinary least-squares solutions, and brings the head's output closer to full attention."""

import pytest
import torch

from headsink import Pattern
from headsink.attention.reference import masked_attention, reference_refit
from headsink.eviction import refitting
from headsink.eviction.refitting import reference_queries, refit_keys, ridge_regression
from headsink.eviction.scorers.prompt import AHEAD
from headsink.models.rope import Rotary, rotate

ROTARY = Rotary(10000 ** -(torch.arange(8) / 8))


def refit(query, key, value, scores, pattern, softmax, rotary):
    """Refit one KV head."""
    queries, key, value, scores = (given[None] for given in (reference_queries(query), key, value, scores))
    return refit_keys(queries, key, value, scores, [pattern], softmax, rotary)[0]


@pytest.mark.parametrize("ridge", [0.01, 10.0])
@pytest.mark.parametrize("shape", [(5, 40), (40, 5)])
def test_the_dual_form_is_ridge_regression(shape, ridge):
    weights, residual = torch.rand(shape, dtype=torch.float64), torch.randn(shape[0], 16, dtype=torch.float64)
    penalty = ridge * weights.square().sum(0).mean()
    primal = torch.linalg.solve(weights.T @ weights + penalty * torch.eye(shape[1]), weights.T @ residual)
    torch.testing.assert_close(ridge_regression(weights, residual, ridge), primal)


def test_without_kept_keys_or_attention_to_them_nothing_changes():
    assert ridge_regression(torch.zeros(4, 0), torch.randn(4, 2), 10.0).shape == (0, 2)
    assert torch.equal(ridge_regression(torch.zeros(4, 3), torch.randn(4, 2), 10.0), torch.zeros(3, 2))


@pytest.mark.parametrize(("softcap", "learned"), [(None, False), (5.0, False), (None, True)])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("pattern", [Pattern(4, 8, 16), Pattern(0, 1, 0), Pattern(2, 60, 5)], ids=str)
def test_keys_and_values_equal_the_reference(pattern, group, softcap, learned, monkeypatch):
    monkeypatch.setattr(refitting, "ROWS", 50)
    monkeypatch.setattr("headsink.attention.reference.ROWS", 50)
    tokens = 101
    query, (key, value) = torch.randn(group, tokens, 16).double(), torch.randn(2, tokens, 16).double()
    scores, sink_logits = torch.randn(tokens).double(), torch.randn(group).double() if learned else None
    given = query, key, value, scores, pattern, (0.25, softcap, sink_logits), ROTARY
    best, keys, values = refit(*given)
    assert len(best) == pattern.top_k
    expected = reference_refit(*given)
    torch.testing.assert_close(key.index_copy(0, best, keys), expected[0])
    torch.testing.assert_close(value.index_copy(0, best, values), expected[1])
    assert ((key != expected[0]).any(1).sum() == 1) == (pattern.top_k > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True])
def test_heads_of_a_layer_are_refitted_as_each_alone(learned, dtype):
    patterns, tokens = [Pattern(4, 8, 16), Pattern(0, 1, 3), Pattern(2, 60, 5)], 101
    query, (key, value) = torch.randn(3, 2, tokens, 16, dtype=dtype), torch.randn(2, 3, tokens, 16, dtype=dtype)
    scores, sink_logits = torch.randn(3, tokens, dtype=torch.float64), torch.randn(3, 2) if learned else None
    logits = None if sink_logits is None else sink_logits.flatten()
    together = refit_keys(reference_queries(query), key, value, scores, patterns, (0.25, None, logits), ROTARY)
    for head, pattern in enumerate(patterns):
        own = None if sink_logits is None else sink_logits[head]
        alone = refit(query[head], key[head], value[head], scores[head], pattern, (0.25, None, own), ROTARY)
        assert torch.equal(together[head][0], alone[0])
        for found, expected in zip(together[head][1:], alone[1:], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_outputs_come_closer_to_full_attention():
    """For queries that nothing was fitted to: the odd ones, while the even ones are the reference queries."""
    tokens, pattern = 600, Pattern(4, 60, 16)
    query, (key, value) = torch.randn(1, tokens, 16).double() * 2, torch.randn(2, tokens, 16).double()
    value += key.roll(1, 0)
    scores = torch.randn(tokens).double()
    best, keys, values = refit(query, key, value, scores, pattern, (0.25, None, None), ROTARY)
    kept = torch.zeros(tokens, dtype=torch.bool)
    kept[torch.cat([best, torch.arange(4), torch.arange(tokens - 16, tokens)])] = True
    again = rotate(query[:, 1::2], tokens + AHEAD, ROTARY)[None]

    def output(keys, values, seen):
        return masked_attention(again, keys[None, None], values[None, None], seen, 0.25)

    full = output(key, value, torch.ones(tokens, dtype=torch.bool))
    before = (output(key, value, kept) - full).norm()
    after = (output(key.index_copy(0, best, keys), value.index_copy(0, best, values), kept) - full).norm()
    assert after < 0.93 * before


def test_evicted_keys_without_attention_get_none():
    """Also where attention to them is 0 in float32, and 0 would be a high logit."""
    tokens, pattern = 300, Pattern(4, 8, 16)
    query, value = torch.zeros(2, tokens, 16), torch.randn(tokens, 16)
    query[..., 7] = 20.0  # the slowest rotary pair
    key = torch.randn(tokens, 16) * 0.01
    key[:, 7] = -40.0
    key[[*range(4), *range(50, 57), *range(tokens - 16, tokens)], 7] = -1.0
    scores = torch.zeros(tokens).index_fill(0, torch.arange(50, 57), 1.0).index_fill(0, torch.tensor(57), 0.5)
    best, keys, values = refit(query, key, value, scores, pattern, (0.25, None, None), ROTARY)
    assert sorted(best.tolist()) == list(range(50, 58))
    assert keys.isfinite().all()
    assert values.isfinite().all()
    assert keys[-1, 7] < -30
