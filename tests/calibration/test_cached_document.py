"""Continuations of a cached document equal one masked pass over both."""

import random
from contextlib import contextmanager

import pytest
import torch
from cached_documents import BRANCH, LENGTH, SOME, everything, make_cached_document, random_document
from families import FAMILIES, tiny
from masks import visible
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from headsink.attention.interface import observe_attention
from headsink.attention.reference import masked_attention
from headsink.calibration.cached_document import CachedDocument
from headsink.eviction.pattern import FULL, Pattern
from headsink.models.spec import attention_modules, describe

OPTIONS = (Pattern(2, 0, 9), Pattern(1, 4, 17), Pattern(0, 3, 0), FULL)


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


def branch_mask(pattern, scores, tokens, slides):
    """Return the definition's mask of the queries after the document, bool [queries, keys].

    scores: float [document's tokens]. The document is compressed at its end; then nothing is evicted.
    """
    positions = torch.arange(tokens)
    if slides:
        return visible(pattern, positions[LENGTH:], positions, torch.zeros(tokens))
    mask = positions <= positions[LENGTH:, None]
    mask[:, :LENGTH] = visible(pattern, positions[LENGTH - 1 : LENGTH], positions[:LENGTH], scores)
    return mask


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    patterns, importance, windows, stored_as = _running[-1]
    layer, heads = module.layer_idx, key.shape[1]
    natural = [Pattern(0, 0, windows[layer]) if windows[layer] else FULL] * heads
    positions, any_scores = torch.arange(LENGTH), torch.zeros(LENGTH)
    masks = [visible(pattern, positions, positions, any_scores) for pattern in natural]
    softmax = scaling, kwargs.get("softcap"), kwargs.get("s_aux")
    before = _masked(*(t[:, :, :LENGTH] for t in (query, key, value)), masks, *softmax)
    key, value = (torch.cat([t[:, :, :LENGTH].to(stored_as).to(t.dtype), t[:, :, LENGTH:]], 2) for t in (key, value))
    masks = [
        branch_mask(pattern, own, key.shape[2], windows[layer] is not None)
        for pattern, own in zip(patterns[layer] or natural, importance[layer], strict=True)
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


def slow_log_probs(model, document, patterns, importance, stored_as):
    with reference(model, patterns, importance, describe(model).windows, stored_as):
        return plain_log_probs(model, document)


# log-probabilities


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_document_with_full_heads_equals_the_model(family, precise):
    model, document = tiny(family, dtype=torch.float64), random_document()
    cached = CachedDocument(model, document)
    expected = plain_log_probs(model, document)
    error = 1e-5 if family == "gemma2" else 1e-9  # its eager attention takes the softmax in float32
    torch.testing.assert_close(cached.full.log_probs, expected, rtol=0, atol=error)
    torch.testing.assert_close(cached.log_probs(everything(cached.shape)), expected, rtol=0, atol=error)
    assert cached.full.targets.tolist() == [t for ids, scored in continuations(document) for t in ids[-scored:]]
    assert cached.full.branch.tolist() == [0] * (BRANCH - 1) + [1] * 4 + [2]
    assert cached.loss(everything(cached.shape)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_keys_and_values_are_close_to_the_model(family):
    """bfloat16 has 8 bits of mantissa: each key and value of the document has a relative error of at most 1/512, up or down."""
    model, document = tiny(family), random_document()
    moved = (CachedDocument(model, document).full.log_probs - plain_log_probs(model, document)).abs()
    assert 0 < float(moved.mean()) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_document_equals_masked_attention(family, precise):
    model, document = tiny(family, dtype=torch.float64), random_document()
    cached = make_cached_document(model)
    for seed in range(2):
        patterns = random_patterns(cached.shape, seed)
        expected = slow_log_probs(model, document, patterns, cached.importance, torch.float64)
        torch.testing.assert_close(cached.log_probs(patterns), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "pattern", [Pattern(3, 4, 1), Pattern(0, 6, 0), Pattern(2, 140, 12), Pattern(0, 0, 0)], ids=str
)
def test_one_pattern_in_every_head_equals_masked_attention(pattern, precise):
    model, document = tiny("llama", dtype=torch.float64), random_document()
    cached = make_cached_document(model)
    patterns = [[pattern] * 2] * 3
    expected = slow_log_probs(model, document, patterns, cached.importance, torch.float64)
    torch.testing.assert_close(cached.log_probs(patterns), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [0, 9])
def test_with_more_top_k_keys_than_tokens_nothing_is_evicted(window, precise):
    cached = make_cached_document(tiny("llama", dtype=torch.float64))
    found = cached.log_probs([[Pattern(2, LENGTH, window)] * 2] * 3)
    torch.testing.assert_close(found, cached.full.log_probs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", SOME)
def test_only_the_documents_keys_and_values_are_rounded(family):
    model, document = tiny(family), random_document()
    cached = make_cached_document(model)
    patterns = random_patterns(cached.shape, 0)
    expected = slow_log_probs(model, document, patterns, cached.importance, torch.bfloat16)
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


# squared errors


@pytest.mark.parametrize("family", SOME)
def test_errors_are_those_of_the_outputs_after_the_projection(family, precise):
    """|W_O (o_full - o_option)|^2 / |W_O o_full|^2 of the layer, mean over the scored tokens, at the full cache's inputs."""
    model = tiny(family, dtype=torch.float64)
    cached = make_cached_document(model)
    found, seen = cached.squared_errors(OPTIONS), {}
    cached._run(everything(cached.shape), lambda inputs, output: seen.update({inputs.layer: (inputs, output)}))
    width = cached.shape.group * cached.shape.head_dim
    expected = torch.zeros_like(found)
    for layer, window in enumerate(cached.shape.windows):
        if window is not None:
            continue
        inputs, full = seen[layer]
        w_o = attention_modules(model)[layer].o_proj.weight.detach()
        full = full[0].transpose(0, 1).flatten(1)[cached._scored]
        size = (full @ w_o.T).square().sum(-1)
        for n, option in enumerate(OPTIONS):
            other = cached._attend(inputs, [option] * cached.shape.kv_heads)
            change = other[0].transpose(0, 1).flatten(1)[cached._scored] - full
            for head in range(cached.shape.kv_heads):
                columns = slice(head * width, (head + 1) * width)
                expected[layer, head, n] = ((change[:, columns] @ w_o[:, columns].T).square().sum(-1) / size).mean()
    assert float(expected.max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    assert not found[..., OPTIONS.index(FULL)].any()


def test_the_model_is_restored():
    model = tiny("llama")
    make_cached_document(model).squared_errors(OPTIONS)
    assert model.config._attn_implementation == "sdpa"
