"""Continuations of a cached document equal one masked pass over both."""

import random
from contextlib import contextmanager

import pytest
import torch
from cached_documents import BRANCH, LENGTH, SOME, everything, make_cached_document, random_document
from families import FAMILIES, tiny
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from headsink.attention.interface import observe_attention
from headsink.attention.reference import masked_attention
from headsink.calibration.cached_document import CachedDocument
from headsink.data.documents import Document
from headsink.eviction.pattern import FULL, Pattern, visible
from headsink.eviction.scorers import LINEAR
from headsink.models.spec import attention_modules, describe

OPTIONS = (Pattern(2, 0, 9), Pattern(1, 4, 17), Pattern(0, 3, 0), FULL)
WEIGHT = 0.25


def continuations(document):
    asked = [(q.ids, q.answer_tokens) for q in document.questions]
    return [(document.continuation, len(document.continuation) - 1), *asked]


def any_pattern(rng):
    """More patterns than plans have: windows that end in a branch, in the document or before it; more top-k keys than tokens."""
    if rng.random() < 0.1:
        return FULL
    top_k, window = rng.choice([0, 1, 3, 30, 300]), rng.choice([0, 1, 2, 7, 20, 100, LENGTH, LENGTH + 5, 300])
    return Pattern(rng.choice([0, 3]), top_k, window)


def random_patterns(shape, seed, make=any_pattern):
    rng = random.Random(seed)
    return [None if window else [make(rng) for _ in range(shape.kv_heads)] for window in shape.windows]


# reference: one pass over document and branch, in which only the branch's queries are masked by patterns

_running = []


def _masked(query, key, value, masks, scaling, softcap, sink_logits):
    """Attention of the last queries over all keys. masks: bool [queries, keys] of each KV head."""
    group = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for head, mask in enumerate(masks):
        rows = slice(head * group, (head + 1) * group)
        given = query[:, rows], key[:, head : head + 1], value[:, head : head + 1], mask
        output[:, rows] = masked_attention(*given, scaling, softcap, None if sink_logits is None else sink_logits[rows])
    return output


def branch_mask(pattern, scores, slides, freeze):
    """Return the definition's mask of the queries after the document, bool [queries, keys]. scores: float [keys]."""
    tokens = torch.arange(len(scores))
    if slides or not freeze:
        return visible(pattern, tokens[LENGTH:], tokens, scores)
    mask = tokens <= tokens[LENGTH:, None]
    mask[:, :LENGTH] = visible(pattern, tokens[LENGTH - 1 : LENGTH], tokens[:LENGTH], scores[:LENGTH])
    return mask


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    patterns, weights, windows, stored_as, freeze = _running[-1]
    layer, heads = module.layer_idx, key.shape[1]
    natural = [Pattern(0, 0, windows[layer]) if windows[layer] else FULL] * heads
    positions, any_scores = torch.arange(LENGTH), torch.zeros(LENGTH)
    masks = [visible(pattern, positions, positions, any_scores) for pattern in natural]
    softmax = scaling, kwargs.get("softcap"), kwargs.get("s_aux")
    before = _masked(*(t[:, :, :LENGTH] for t in (query, key, value)), masks, *softmax)
    key, value = (torch.cat([t[:, :, :LENGTH].to(stored_as).to(t.dtype), t[:, :, LENGTH:]], 2) for t in (key, value))
    scores = LINEAR.scores(key[0], value[0], weights[layer])
    masks = [
        branch_mask(pattern, own, windows[layer] is not None, freeze)
        for pattern, own in zip(patterns[layer] or natural, scores, strict=True)
    ]
    after = _masked(query[:, :, LENGTH:], key, value, masks, *softmax)
    return torch.cat([before, after], 2).transpose(1, 2), None


AttentionInterface.register("cached_document_reference", _attention)
AttentionMaskInterface.register("cached_document_reference", sdpa_mask)


@contextmanager
def reference(model, *how):
    before = model.config._attn_implementation
    model.set_attn_implementation("cached_document_reference")
    _running.append(how)
    try:
        yield
    finally:
        _running.pop()
        model.set_attn_implementation(before)


@torch.no_grad()
def plain_log_probs(model, document):
    """Return log-probabilities of the scored tokens of all continuations, by one pass over document and branch for each."""
    found = []
    for ids, scored in continuations(document):
        logits = model(torch.tensor([document.ids + ids]), use_cache=False).logits[0, -scored - 1 : -1]
        found.append(logits.float().log_softmax(-1))
    return torch.cat(found)


def slow_log_probs(model, document, patterns, weights, stored_as, freeze=False):
    with reference(model, patterns, weights, describe(model).windows, stored_as, freeze):
        return plain_log_probs(model, document)


# log-probabilities


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_document_with_full_heads_equals_the_model(family, precise):
    model, document = tiny(family, dtype=torch.float64), random_document()
    cached = CachedDocument(model, document)
    expected = plain_log_probs(model, document)
    error = 1e-5 if family == "gemma2" else 1e-9  # its eager attention takes the softmax in float32
    torch.testing.assert_close(cached.full, expected, rtol=0, atol=error)
    torch.testing.assert_close(cached.log_probs(everything(cached.shape)), expected, rtol=0, atol=error)
    assert cached.forms == ["text", "one", "two"]
    assert cached.targets.tolist() == [token for ids, scored in continuations(document) for token in ids[-scored:]]
    assert cached.branch.tolist() == [0] * (BRANCH - 1) + [1] * 4 + [2]
    assert float(cached.divergences(cached.full).abs().max()) == 0
    assert float(cached.loss(cached.full, WEIGHT)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_keys_and_values_are_close_to_the_model(family):
    """bfloat16 has 8 bits of mantissa: each key and value of the document has a relative error of at most 1/512, up or down."""
    model, document = tiny(family), random_document()
    moved = (CachedDocument(model, document).full - plain_log_probs(model, document)).abs()
    assert 0 < float(moved.mean()) < 0.02
    windows = [[Pattern(2, 0, 17)] * describe(model).kv_heads if w is None else None for w in describe(model).windows]
    if any(windows):  # a pattern changes it by far more
        by_pattern = CachedDocument(model, document).log_probs(windows) - plain_log_probs(model, document)
        assert float(by_pattern.abs().mean()) > 4 * float(moved.mean())


every_hold = pytest.mark.parametrize("freeze", [False, True])


@every_hold
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_document_equals_masked_attention(family, freeze, precise):
    model, document = tiny(family, dtype=torch.float64), random_document()
    cached, weights = make_cached_document(model, freeze=freeze)
    for seed in range(4):
        patterns = random_patterns(cached.shape, seed)
        expected = slow_log_probs(model, document, patterns, weights, torch.float64, freeze)
        torch.testing.assert_close(cached.log_probs(patterns), expected, rtol=0, atol=1e-9)


@every_hold
@pytest.mark.parametrize(
    "pattern", [Pattern(3, 4, 1), Pattern(0, 6, 0), Pattern(2, 140, 12), Pattern(0, 0, 0)], ids=str
)
def test_one_pattern_in_every_head_equals_masked_attention(pattern, freeze, precise):
    model, document = tiny("llama", dtype=torch.float64), random_document()
    cached, weights = make_cached_document(model, freeze=freeze)
    patterns = [[pattern] * 2] * 3
    found = cached.log_probs(patterns)
    expected = slow_log_probs(model, document, patterns, weights, torch.float64, freeze)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    other = slow_log_probs(model, document, patterns, weights, torch.float64, not freeze)
    assert float((found - other).abs().max()) > 1e-3


@every_hold
@pytest.mark.parametrize("window", [0, 9])
def test_with_more_top_k_keys_than_tokens_nothing_is_evicted(window, freeze, precise):
    cached, _ = make_cached_document(tiny("llama", dtype=torch.float64), freeze=freeze)
    found = cached.log_probs([[Pattern(2, LENGTH + BRANCH, window)] * 2] * 3)
    torch.testing.assert_close(found, cached.full, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", SOME)
def test_with_freeze_a_branch_sees_as_many_keys_as_a_pattern_keeps(family):
    cached, _ = make_cached_document(tiny(family), freeze=True)
    layer = cached.shape.windows.index(None)
    heads = list(range(cached.shape.kv_heads))
    for seed in range(6):
        pattern = any_pattern(random.Random(seed))
        if not pattern.full:
            assert cached._kept(layer, heads, pattern).shape == (len(heads), pattern.size(LENGTH))


@every_hold
@pytest.mark.parametrize("family", SOME)
def test_only_the_documents_keys_and_values_are_rounded(family, freeze):
    model, document = tiny(family), random_document()
    cached, weights = make_cached_document(model, freeze=freeze)
    for seed in range(2):
        patterns = random_patterns(cached.shape, seed)
        expected = slow_log_probs(model, document, patterns, weights, torch.bfloat16, freeze)
        torch.testing.assert_close(cached.log_probs(patterns), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", SOME)
def test_cached_keys_and_values_are_the_documents(family):
    model, document, seen = tiny(family), random_document(), []
    with observe_attention(model, seen.append), torch.no_grad():
        model(torch.tensor([document.ids]), use_cache=False)
    cached = CachedDocument(model, document)
    for layer, window in enumerate(cached.shape.windows):
        for kept, own in zip(cached.key_values(layer), (seen[layer].key, seen[layer].value), strict=True):
            assert torch.equal(kept, own[0, :, -(window or LENGTH) :].bfloat16())


# the loss and its slopes


def test_the_loss_matches_its_formula():
    cached, _ = make_cached_document(tiny("llama"))
    other = torch.randn_like(cached.full).log_softmax(-1)
    expected = torch.zeros(3)
    for number, (_, scored) in enumerate(continuations(random_document())):
        rows = torch.arange(len(cached.full))[cached.branch == number]
        assert len(rows) == scored
        for row in rows:
            p, q = cached.full[row].exp(), other[row].exp()
            expected[number] += (p * (p / q).log()).sum() / scored
    torch.testing.assert_close(cached.divergences(other), expected, rtol=1e-4, atol=1e-5)
    for weight in (0.0, 0.25, 2.0):
        loss = expected[0] + weight * (expected[1] + expected[2]) / 2
        torch.testing.assert_close(cached.loss(other, weight), loss, rtol=1e-4, atol=1e-5)


def test_a_document_without_questions_has_the_loss_of_its_text():
    document = random_document()
    cached = CachedDocument(tiny("llama"), Document(document.ids, document.continuation, []))
    other = torch.randn_like(cached.full).log_softmax(-1)
    assert float(cached.loss(other, WEIGHT)) == float(cached.divergences(other)[0])


def loss_along(cached, patterns, layer, head, option, share):
    """Return the loss with one head's output interpolated towards that of another pattern."""
    group = cached.shape.group
    rows = slice(head * group, (head + 1) * group)

    def look(inputs, output):
        if inputs.layer == layer:
            output = output.clone()
            output[:, rows] += share * (cached._part(inputs, [head], option).flatten(0, 1) - output[:, rows])
        return output

    with torch.no_grad():
        return float(cached.loss(cached._run(patterns, look), WEIGHT))


@pytest.mark.parametrize("family", SOME)
def test_gradients_are_finite_differences(family, precise):
    cached, _ = make_cached_document(tiny(family, dtype=torch.float64))
    planned = [layer for layer, window in enumerate(cached.shape.windows) if window is None]
    for seed in range(2):
        patterns = random_patterns(cached.shape, seed)
        found = cached.marginals(patterns, OPTIONS, WEIGHT)
        assert found.loss == pytest.approx(float(cached.loss(cached.log_probs(patterns), WEIGHT)), rel=1e-9)
        assert float(found.gradient.abs().max()) > 1e-3
        # With a smaller step, rounding of the float32 norms dominates; with a larger one, other top-k keys may be chosen.
        rng, share = random.Random(seed), 0.001
        for _ in range(6):
            layer, head, n = (
                rng.choice(planned),
                rng.randrange(cached.shape.kv_heads),
                rng.randrange(len(OPTIONS)),
            )
            up, down = (loss_along(cached, patterns, layer, head, OPTIONS[n], x) for x in (share, -share))
            expected = (up - down) / (2 * share)
            assert float(found.gradient[layer, head, n]) == pytest.approx(expected, rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("family", SOME)
def test_errors_are_those_of_the_outputs_after_the_projection(family, precise):
    """|W_O (o_plan - o_option)|^2 / |W_O o_plan|^2 of the layer, mean over the scored tokens."""
    model = tiny(family, dtype=torch.float64)
    cached, _ = make_cached_document(model)
    patterns = random_patterns(cached.shape, 3, lambda rng: any_pattern(rng) if rng.random() < 0.5 else OPTIONS[0])
    width = cached.shape.group * cached.shape.head_dim

    def outputs(rows):
        """At the plan's inputs, every layer's output under other patterns: float64 [layers, scored tokens, heads x dim]."""
        found = {}

        def look(inputs, output):
            heads = [cached._part(inputs, [head], p) for head, p in enumerate(rows[inputs.layer] or [])]
            found[inputs.layer] = torch.cat(heads).flatten(0, 1)[None] if heads else output
            return output

        with torch.no_grad():
            cached._run(patterns, look)
        return [found[n][0].transpose(0, 1).flatten(1)[cached.scored] for n in range(cached.shape.layers)]

    now, found = outputs(patterns), cached.marginals(patterns, OPTIONS, WEIGHT).error
    expected = torch.zeros_like(found)
    for n, option in enumerate(OPTIONS):
        other = outputs([row and [option] * len(row) for row in patterns])
        for layer, row in enumerate(patterns):
            w_o = attention_modules(model)[layer].o_proj.weight.detach()
            size = (now[layer] @ w_o.T).square().sum(-1)
            for head in range(len(row or [])):
                columns = slice(head * width, (head + 1) * width)
                wrong = ((other[layer] - now[layer])[:, columns] @ w_o[:, columns].T).square().sum(-1)
                expected[layer, head, n] = (wrong / size).mean()
    assert float(expected.max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", SOME)
def test_a_heads_current_pattern_has_zero_cost(family):
    cached, _ = make_cached_document(tiny(family))
    patterns = random_patterns(cached.shape, 0, lambda rng: rng.choice(OPTIONS))
    found = cached.marginals(patterns, OPTIONS, WEIGHT)
    for layer, row in enumerate(patterns):
        for head in range(cached.shape.kv_heads):
            for n, option in enumerate(OPTIONS):
                same = row is None or row[head] == option
                assert (float(found.error[layer, head, n]) == 0) == same
                assert (float(found.gradient[layer, head, n]) == 0) == same


@pytest.mark.parametrize("family", SOME)
def test_gradients_from_16_bits_are_close(family, monkeypatch):
    """Output differences are stored in bfloat16: relative error at most 1/512, which the sum over tokens cannot increase."""
    cached, _ = make_cached_document(tiny(family))
    patterns = random_patterns(cached.shape, 1)
    found = cached.marginals(patterns, OPTIONS, WEIGHT)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    exact = cached.marginals(patterns, OPTIONS, WEIGHT)
    assert found.loss == exact.loss
    assert float((found.gradient - exact.gradient).abs().max()) < 0.01 * float(exact.gradient.abs().max())
    torch.testing.assert_close(found.error, exact.error, rtol=0.02, atol=1e-6)


def test_the_model_is_restored():
    model = tiny("llama")
    cached, _ = make_cached_document(model)
    cached.marginals([[Pattern(1, 2, 8)] * 2] * 3, OPTIONS, WEIGHT)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
