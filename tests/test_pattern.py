"""The definition, against its own sentence read key by key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headsink import HeadsinkError, Pattern
from headsink.pattern import reference_attention, visible

patterns = st.one_of(st.just(Pattern()), st.builds(Pattern, st.integers(0, 6), st.integers(0, 6), st.integers(0, 20)))
shorts = st.lists(st.booleans(), min_size=1, max_size=40)


def sees(pattern: Pattern, i: int, j: int, short: list[bool]) -> bool:
    """Section 3 of the design, one query and one key."""
    if j > i:
        return False
    if pattern.window is None or j < pattern.sink or i - j < pattern.window:
        return True
    left = [k for k in range(pattern.sink, i - pattern.window + 1) if short[k]]
    return j in left[max(0, len(left) - pattern.floating) :]


@given(patterns, shorts)
@settings(max_examples=200, deadline=None)
def test_mask_is_the_definition(pattern, short):
    n = torch.arange(len(short))
    expected = [[sees(pattern, i, j, short) for j in n.tolist()] for i in n.tolist()]
    assert visible(pattern, n, n, torch.tensor(short)).tolist() == expected


@given(patterns, shorts, st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_padding_moves_the_text_and_hides_nothing_else(pattern, short, pad):
    n = torch.arange(len(short))
    alone = visible(pattern, n, n, torch.tensor(short))
    moved = torch.arange(-pad, len(short))
    padded = visible(pattern, n, moved, torch.tensor([True] * pad + short))
    assert torch.equal(padded[:, pad:], alone)
    assert not padded[:, :pad].any()


@given(patterns, shorts)
@settings(max_examples=100, deadline=None)
def test_a_prefix_sees_what_the_whole_text_sees(pattern, short):
    n, half = torch.arange(len(short)), len(short) // 2
    whole = visible(pattern, n, n, torch.tensor(short))
    prefix = visible(pattern, n[:half], n[:half], torch.tensor(short[:half], dtype=torch.bool))
    assert torch.equal(whole[:half, :half], prefix)


@given(
    patterns, st.lists(shorts, min_size=2, max_size=2), st.lists(st.integers(0, 9), min_size=2, max_size=2), st.data()
)
@settings(max_examples=200, deadline=None)
def test_mask_of_some_queries_of_a_padded_batch(pattern, short, pads, data):
    length = max(map(len, short))
    short = [row + row[-1:] * (length - len(row)) for row in short]
    rows = data.draw(st.lists(st.integers(0, length - 1), min_size=1, unique=True).map(sorted))
    keys = torch.arange(length) - torch.tensor(pads)[:, None]
    mask = visible(pattern, keys[:, rows], keys, torch.tensor(short))
    for n, pad in enumerate(pads):
        text = short[n][pad:]
        expected = [[j >= pad and sees(pattern, i - pad, j - pad, text) for j in range(length)] for i in rows]
        assert mask[n].tolist() == expected


@given(patterns, shorts)
@settings(max_examples=100, deadline=None)
def test_no_query_sees_more_than_is_held(pattern, short):
    n = torch.arange(len(short))
    seen = visible(pattern, n, n, torch.tensor(short)).sum(-1)
    assert (seen <= torch.tensor([pattern.size(i + 1) for i in n.tolist()])).all()


@given(patterns, st.integers(1, 500))
def test_size_is_never_more_than_the_text(pattern, context):
    assert 0 <= pattern.size(context) <= context


@pytest.mark.parametrize(
    "values", [(-1, 0, 4), (0, -1, 4), (0, 0, -1), (4, 0, None), (0, 2, None), (1.5, 0, 4), (True, 0, 4)]
)
def test_nonsense_is_refused(values):
    with pytest.raises(HeadsinkError):
        Pattern(*values)


def test_full_attention_is_softmax_attention():
    query, key, value = (torch.randn(2, heads, 30, 8, dtype=torch.float64) for heads in (4, 2, 2))
    thresholds = torch.zeros(2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, scale=0.3
    )
    assert torch.allclose(reference_attention(query, key, value, [Pattern()] * 2, thresholds, 0.3), expected)


def test_no_key_at_all_gives_zero():
    query, key, value = (torch.randn(1, 1, 10, 8) for _ in range(3))
    output = reference_attention(query, key, value, [Pattern(0, 0, 0)], torch.zeros(1), 1.0)
    assert torch.equal(output, torch.zeros_like(output))
