"""Importance by context reconstruction and scorer weights equal reference computations."""

import itertools

import pytest
import torch
from cached_documents import LENGTH, SOME, random_document, random_weights
from families import FAMILIES, tiny

from headsink import HeadsinkError, Pattern, Plan
from headsink.calibration import score_fit
from headsink.calibration.cached_document import CachedDocument
from headsink.calibration.score_fit import (
    LEAST,
    RIDGE,
    TOKENS,
    WEIGHT,
    ImportanceScores,
    ScorerFit,
    _starts,
    measure_importance,
)
from headsink.compression.reconstruction import LEAD, PROMPT, SPAN, prompt_tokens
from headsink.eviction.scorers import LINEAR
from headsink.models.spec import attention_modules


def letters(text, add_special_tokens=True):
    """A tokenizer for the vocabulary of tiny models."""
    assert not add_special_tokens
    return {"input_ids": [3 + ord(letter) % 208 for letter in text]}


def spans(length):
    return [range(start, min(start + SPAN, length)) for start in _starts(length)]


def fit(contexts, importance):
    """Return the scorer weights of documents."""
    made = ScorerFit(contexts[0].shape)
    for context, scores in zip(contexts, importance, strict=True):
        made.add(context, scores)
    return made.weights()


def cache_and_measure(model, seed=0):
    cached = CachedDocument(model, random_document(seed))
    return cached, measure_importance(cached, prompt_tokens(letters))


# importance by context reconstruction


@torch.no_grad()
def reference_importance(family, ids):
    """Compute importance by one pass over document, prompt and span for each span: log attention, [layers, KV heads, keys]."""
    model, found = tiny(family, dtype=torch.float64, attention="eager"), []
    prompt, kv_heads = letters(PROMPT, add_special_tokens=False)["input_ids"], model.config.num_key_value_heads
    for span in spans(len(ids)):
        sequence = ids + prompt + ids[span.start - LEAD : span.stop]
        layers = model(torch.tensor([sequence]), use_cache=False, output_attentions=True).attentions
        seen = torch.stack(layers)[:, 0, :, len(ids) :, span.start : span.stop]  # [layers, query heads, queries, keys]
        found.append(seen.unflatten(1, (kv_heads, -1)).amax((2, 3)).log())
    return torch.cat(found, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_maximum_attention_of_a_full_pass(family, precise):
    cached, importance = cache_and_measure(tiny(family, dtype=torch.float64))
    expected = reference_importance(family, cached.ids).clamp(min=LEAST).float()
    expected[[window is not None for window in cached.shape.windows]] = 0
    torch.testing.assert_close(importance.attention.double(), expected, rtol=0, atol=2e-5)
    assert importance.positions.tolist() == list(range(LEAD, LENGTH))


@pytest.mark.parametrize("family", SOME)
def test_the_whole_document_has_the_importance_of_its_spans(family, precise):
    """Spans begin elsewhere, so other queries count, but keys are the same."""
    cached, sampled = cache_and_measure(tiny(family, dtype=torch.float64))
    whole = measure_importance(cached, prompt_tokens(letters), whole=True)
    assert whole.positions.tolist() == list(range(LENGTH))
    rest = whole.without_lead()
    assert torch.equal(rest.positions, sampled.positions)
    assert torch.equal(rest.attention, whole.attention[..., LEAD:])
    planned = [window is None for window in cached.shape.windows]
    both = torch.stack([rest.attention[planned].flatten(), sampled.attention[planned].flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.8


def test_importance_without_attention_is_bounded(monkeypatch):
    model = tiny("llama")
    _, importance = cache_and_measure(model)
    monkeypatch.setattr(score_fit, "LEAST", -3.0)
    _, bounded = cache_and_measure(model)
    assert float(importance.attention.min()) < -3 < float(importance.attention.max())
    assert torch.equal(bounded.attention, importance.attention.clamp(min=-3))


@pytest.mark.parametrize("family", SOME)
def test_importance_from_16_bit_keys_is_close(family):
    _, importance = cache_and_measure(tiny(family))
    _, exact = cache_and_measure(tiny(family, dtype=torch.float64))
    difference, spread = (importance.attention - exact.attention).abs().mean(), exact.attention.std(-1).mean()
    assert 0 < float(difference) < 0.05 * float(spread)


def test_a_short_document_is_reconstructed_completely():
    for length in (256, LEAD + SPAN, LEAD + SPAN + 1, 600, LEAD + TOKENS - 1, LEAD + TOKENS):
        covered = [position for span in spans(length) for position in span]
        assert covered == list(range(LEAD, length))


def test_spans_of_a_long_document_are_evenly_spaced():
    for length in (LEAD + TOKENS + 1, 2048, 5000, 131_072):
        found = spans(length)
        assert sum(map(len, found)) == TOKENS
        assert {len(span) for span in found} == {SPAN}
        assert (found[0].start, found[-1].stop) == (LEAD, length)
        apart = [b.start - a.start for a, b in itertools.pairwise(found)]
        assert SPAN <= min(apart) <= max(apart) <= min(apart) + 1


# weights


def slow_ridge(features, targets):
    """Least squares with a row per key, weighted by attention ** WEIGHT, and a row per feature for its penalty."""
    weight = (WEIGHT * targets).exp()
    weight = weight / weight.sum()
    features, targets = features - weight @ features, targets - weight @ targets
    spread = weight @ features.square()
    penalty = (RIDGE * spread + 1e-6 * spread.mean()).sqrt().diag()
    left = torch.cat([features * weight.sqrt()[:, None], penalty])
    right = torch.cat([targets * weight.sqrt(), torch.zeros(len(penalty))])
    return torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("family", SOME)
def test_scorer_weights_are_least_squares_over_all_documents(family):
    model = tiny(family)
    documents, importance = zip(*(cache_and_measure(model, seed) for seed in range(2)), strict=True)
    weights = fit(documents, importance)
    for layer, window in enumerate(documents[0].shape.windows):
        if window is not None:
            assert not weights[layer].any()
            continue
        cached = [
            [t[:, one.positions] for t in r.key_values(layer)] for r, one in zip(documents, importance, strict=True)
        ]
        features = torch.cat([LINEAR.features(*kept).double() for kept in cached], 1)
        targets = torch.cat([one.attention[layer].double() for one in importance], 1)
        for head in range(documents[0].shape.kv_heads):
            expected = slow_ridge(features[head], targets[head])
            expected = (expected / expected.abs().max()).float()
            torch.testing.assert_close(weights[layer, head], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_scorer_weights_are_rounded_and_scaled_to_1(family):
    cached, importance = cache_and_measure(tiny(family))
    for layer in fit([cached], [importance])[[window is None for window in cached.shape.windows]]:
        for head in layer.tolist():
            assert max(map(abs, head)) == 1
            assert all(float(f"{x:.6g}") == round(x, 4) for x in head)  # as written in a plan


@pytest.mark.parametrize("family", SOME)
def test_a_linear_rule_is_recovered(family):
    """The rule also orders the keys of another document."""
    model = tiny(family)
    *documents, other = (CachedDocument(model, random_document(seed)) for seed in range(3))
    planned = [layer for layer, window in enumerate(other.shape.windows) if window is None]
    positions, planted, importance = torch.arange(LEAD, LENGTH), random_weights(other.shape), []
    for cached in documents:
        attention = torch.zeros(cached.shape.layers, cached.shape.kv_heads, len(positions))
        for layer in planned:
            keys, values = cached.key_values(layer)
            attention[layer] = 0.3 * LINEAR.scores(keys, values, planted[layer])[:, positions] - 7
        importance.append(ImportanceScores(positions, attention))
    weights = fit(documents, importance)
    for layer in planned:
        found, right = (LINEAR.scores(*other.key_values(layer), w[layer]) for w in (weights, planted))
        for a, b in zip(found, right, strict=True):
            assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.999


def test_a_head_without_important_keys_gets_valid_scorer_weights():
    cached, importance = cache_and_measure(tiny("llama"))
    importance.attention[1, 0] = LEAST
    weights = fit([cached], [importance])
    assert weights[1, 0].any()
    Plan.of(cached.model, [[Pattern(4, 2, 8)] * 2] * 3, weights)


def test_a_model_that_overflows_is_refused():
    model = tiny("llama")
    with torch.no_grad():
        attention_modules(model)[2].v_proj.weight[5] = float("inf")
    cached, importance = cache_and_measure(model)
    with pytest.raises(HeadsinkError, match="the model's attention is not finite here; try --dtype"):
        fit([cached], [importance])
