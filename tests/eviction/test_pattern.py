"""The mask equals the definition applied key by key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import visible

from headsink import HeadsinkError, Pattern
from headsink.attention.reference import reference_attention
from headsink.eviction.scorers import LINEAR

patterns = st.one_of(st.just(Pattern()), st.builds(Pattern, st.integers(0, 6), st.integers(0, 6), st.integers(0, 20)))
texts = st.lists(st.floats(-9, 9, width=32), unique=True, min_size=1, max_size=40)  # the scores of their keys


def sees(pattern: Pattern, i: int, j: int, scores: list[float]) -> bool:
    """The definition, for one query and one key."""
    if j > i:
        return False
    if pattern.window is None or j < pattern.sink or i - j < pattern.window:
        return True
    left = range(pattern.sink, i - pattern.window + 1)
    return j in left and sum(scores[k] > scores[j] for k in left) < pattern.top_k


@given(patterns, texts)
@settings(max_examples=200)
def test_mask_is_the_definition(pattern, scores):
    n = torch.arange(len(scores))
    expected = [[sees(pattern, i, j, scores) for j in n.tolist()] for i in n.tolist()]
    assert visible(pattern, n, n, torch.tensor(scores)).tolist() == expected


@given(patterns, texts, st.integers(1, 10))
@settings(max_examples=100)
def test_padding_shifts_positions_and_hides_only_itself(pattern, scores, pad):
    n = torch.arange(len(scores))
    alone = visible(pattern, n, n, torch.tensor(scores))
    moved = torch.arange(-pad, len(scores))
    padded = visible(pattern, n, moved, torch.tensor([99.0] * pad + scores))
    assert torch.equal(padded[:, pad:], alone)
    assert not padded[:, :pad].any()


@given(patterns, texts)
@settings(max_examples=100)
def test_a_prefix_has_the_same_mask_as_the_whole_text(pattern, scores):
    n, half = torch.arange(len(scores)), len(scores) // 2
    whole = visible(pattern, n, n, torch.tensor(scores))
    prefix = visible(pattern, n[:half], n[:half], torch.tensor(scores[:half]))
    assert torch.equal(whole[:half, :half], prefix)


@given(
    patterns, st.lists(texts, min_size=2, max_size=2), st.lists(st.integers(0, 9), min_size=2, max_size=2), st.data()
)
@settings(max_examples=200)
def test_mask_of_some_queries_of_a_padded_batch(pattern, scores, pads, data):
    length = max(map(len, scores))
    scores = [row + [10.0 + n for n in range(length - len(row))] for row in scores]
    rows = data.draw(st.lists(st.integers(0, length - 1), min_size=1, unique=True).map(sorted))
    keys = torch.arange(length) - torch.tensor(pads)[:, None]
    mask = visible(pattern, keys[:, rows], keys, torch.tensor(scores))
    for n, pad in enumerate(pads):
        text = scores[n][pad:]
        expected = [[j >= pad and sees(pattern, i - pad, j - pad, text) for j in range(length)] for i in rows]
        assert mask[n].tolist() == expected


@given(patterns, texts)
@settings(max_examples=100)
def test_no_query_sees_more_keys_than_are_cached(pattern, scores):
    n = torch.arange(len(scores))
    seen = visible(pattern, n, n, torch.tensor(scores)).sum(-1)
    assert (seen <= torch.tensor([pattern.size(i + 1) for i in n.tolist()])).all()


@given(patterns, st.integers(1, 500))
def test_size_never_exceeds_the_sequence(pattern, context):
    assert 0 <= pattern.size(context) <= context


@pytest.mark.parametrize(
    "values",
    [
        (-1, 0, 4),
        (0, -1, 4),
        (0, 0, -1),
        (4, 0, None),
        (0, 2, None),
        (1.5, 0, 4),
        (True, 0, 4),
        (0, 0, 2**31),
        (2**70, 0, 0),
    ],
)
def test_invalid_patterns_are_refused(values):
    with pytest.raises(HeadsinkError):
        Pattern(*values)


def test_full_attention_is_softmax_attention():
    query, key, value = (torch.randn(2, heads, 30, 8, dtype=torch.float64) for heads in (4, 2, 2))
    weights = torch.zeros(2, LINEAR.n_features(8))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, scale=0.3
    )
    assert torch.allclose(reference_attention(query, key, value, [Pattern()] * 2, weights, 0.3), expected)


def test_no_key_at_all_gives_zero():
    query, key, value = (torch.randn(1, 1, 10, 8) for _ in range(3))
    output = reference_attention(query, key, value, [Pattern(0, 0, 0)], torch.zeros(1, LINEAR.n_features(8)), 1.0)
    assert torch.equal(output, torch.zeros_like(output))
