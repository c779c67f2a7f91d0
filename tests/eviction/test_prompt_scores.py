"""Prompt scores of the keys of a segment, against slow loops."""

import pytest
import torch

from headsink.eviction.scorers.prompt import (
    AHEAD,
    BEFORE,
    LEAST,
    STRIDE,
    largest_shares,
    match_scale,
    nearby_shares,
    segment_scores,
)
from headsink.models.rope import Rotary, rotate
from headsink.utils.flash import causal_attention

ROTARY = Rotary(torch.tensor([0.9, 0.2, 0.03], dtype=torch.float64))
SCALE = 0.7


def text(heads, group, tokens, dtype=torch.float64, batch=1):
    query = torch.randn(batch, heads * group, tokens, 6, dtype=torch.float64).to(dtype)
    return query, *torch.randn(2, batch, heads, tokens, 6, dtype=torch.float64).to(dtype)


def slow_shares(query, key, softcap, sink_logits):
    """For each key j: the largest logit of every second query i from j - 8 to j + 128, repeated after the text, minus its lse."""
    (heads, tokens, _), group = key.shape, len(query) // len(key)
    cap = (lambda x: x) if softcap is None else (lambda x: softcap * torch.tanh(x / softcap))
    query, key = query.double(), key.double()
    again, found = (
        rotate(query, tokens + AHEAD, ROTARY),
        torch.full((heads, tokens), float("-inf"), dtype=torch.float64),
    )
    for head in range(heads):
        for row in range(head * group, (head + 1) * group):
            for i in range(0, tokens, 2):
                own = cap(key[head, : i + 1] @ query[row, i] * SCALE)
                if sink_logits is not None:
                    own = torch.cat([own, sink_logits[row : row + 1].double()])
                near = slice(max(i - 128, 0), min(i + 8, tokens - 1) + 1)
                shares = cap(key[head, near] @ again[row, i] * SCALE) - own.logsumexp(0)
                found[head, near] = found[head, near].maximum(shares)
    return found


@pytest.mark.parametrize("tokens", [1, 32, 33, 137, 301])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("softcap", "some"),
    [(None, False), (3.0, False), (None, True), (3.0, True)],
    ids=["plain", "capped", "sinks", "both"],
)
def test_the_largest_shares_equal_a_slow_loop(tokens, group, dtype, softcap, some):
    query, key, value = text(2, group, tokens, dtype)
    sink_logits = torch.randn(2 * group) if some else None
    expected, atol = (
        slow_shares(query[0], key[0], softcap, sink_logits),
        1e-9 if dtype == torch.float64 else 1e-4,
    )  # of angles
    given = query[0], key[0], (SCALE, softcap, sink_logits), ROTARY
    found = largest_shares(*given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)
    if softcap is None and not some:
        _, lse = causal_attention(query, key, value, None, SCALE)
        torch.testing.assert_close(largest_shares(*given, lse[0]).double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("chunks", [[300, 1], [1, 300], [100, 101, 100], [7, 3, 2, 1, 200, 88]])
def test_the_largest_shares_of_a_text_read_in_chunks(chunks):
    """The queries of the last tokens of a chunk are kept for the first keys of the next."""
    query, key, value = (given[0] for given in text(2, 3, 301))
    _, lse = causal_attention(query[None], key[None], value[None], None, SCALE)
    softmax, found = (SCALE, None, None), torch.full((2, 301), float("-inf"), dtype=torch.float64)
    end = 0
    for size in chunks:
        begin, end = max(end - BEFORE, 0), end + size
        begin += begin % STRIDE
        part = slice(begin, end, STRIDE)
        first = max(begin - 128, 0)
        shares = nearby_shares(query[:, part], lse[0, :, part], begin, key[:, first:end], first, 301, softmax, ROTARY)
        found[:, first:end] = found[:, first:end].maximum(shares)
    torch.testing.assert_close(found, largest_shares(query, key, softmax, ROTARY, lse[0]))


@pytest.mark.parametrize("keys", [2, 5, 64])
def test_matched_scores_have_their_own_order_and_lie_between_those_of_the_scale(keys):
    scores, scale = torch.randn(2, 3, keys, dtype=torch.float64)
    found = match_scale(scores, scale)
    assert torch.equal(found.argsort(-1), scores.argsort(-1))
    values, below = found.sort(-1).values, scale.sort(-1).values
    assert (values > below).all()
    assert (values[:, :-1] < below[:, 1:]).all()
    torch.testing.assert_close(values[:, :-1], (below[:, :-1] + below[:, 1:]) / 2)
    torch.testing.assert_close(values[:, -1] - below[:, -1], (below[:, -1] - below[:, -2]) / 2)


def expected_scores(query, key, scores):
    """Return the scores of one text: log(exp(a) + exp(b)) of both kinds, standardised, on the scale of `scores`."""
    sums = sum(
        ((t - t.mean(-1, keepdim=True)) / t.std(-1, keepdim=True)).exp()
        for t in (slow_shares(query, key, None, None), scores)
    )
    return match_scale(sums.log(), scores)


@pytest.mark.parametrize("known", [False, True], ids=["lse computed", "lse given"])
def test_a_padded_row_has_the_scores_of_its_text_alone(known):
    """A row with fewer real tokens than `LEAST` keeps those of the plan's scorer."""
    tokens, pads = 70, torch.tensor([0, 13, 70 - LEAST, 71 - LEAST, 70])
    query, key, value = text(2, 2, tokens, batch=len(pads))
    scores = torch.randn(len(pads), 2, tokens, dtype=torch.float64)
    lse = causal_attention(query, key, value, pads, SCALE)[1] if known else None
    found = segment_scores(query, key, scores, pads, (SCALE, None, None), ROTARY, lse)
    for row, first in enumerate(pads.tolist()):
        own = slice(first, None)
        expected = scores[row, :, own]
        if tokens - first >= LEAST:
            expected = expected_scores(query[row, :, own], key[row, :, own], scores[row, :, own])
            one = query[row : row + 1, :, own], key[row : row + 1, :, own], scores[row : row + 1, :, own]
            alone = segment_scores(*one, None, (SCALE, None, None), ROTARY)
            torch.testing.assert_close(found[row, :, own], alone[0])
        torch.testing.assert_close(found[row, :, own], expected)


def test_short_segments_and_unknown_embeddings_leave_the_choice_to_the_scorer():
    query, key, _ = text(2, 2, LEAST)
    scores = torch.randn(1, 2, LEAST)
    assert segment_scores(query, key, scores, None, (SCALE, None, None), None) is None
    assert segment_scores(query, key, scores, None, (SCALE, None, None), ROTARY) is not None
    short = query[:, :, 1:], key[:, :, 1:], scores[..., 1:]
    assert segment_scores(*short, None, (SCALE, None, None), ROTARY) is None
