"""Attention of many tokens on a GPU against the definition, in float64."""

from __future__ import annotations

import pytest
import torch
from waiting import Waiting

from headsink.attention.cuda import prefill
from headsink.attention.interface import Update
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import KeyVisibility
from headsink.cache import prefill_cuda
from headsink.cache.layer import PlanLayer
from headsink.cache.options import LayerOptions
from headsink.cache.segments import PrefillOptions
from headsink.eviction.pattern import FULL, Pattern
from headsink.eviction.scorers import LINEAR

TYPES = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def slow(query, keys, values, columns, until, first, scaling, softcap=None, sink_logits=None):
    """query: [heads, group, tokens, dim]. Returns the output and the log-sum-exp in float64."""
    now = first + torch.arange(query.shape[2], device=query.device)[:, None]
    seen = (columns <= now) & (now < until[:, None])
    logits = torch.einsum("hgtd,hkd->hgtk", query.double(), keys.double()) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    lse = logits.logsumexp(-1)
    if sink_logits is not None:
        extra = sink_logits.double().view(len(keys), -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    shares = logits.softmax(-1).nan_to_num(0.0)[..., : keys.shape[1]]
    return shares @ values.double()[:, None], lse


def case(heads, tokens, dim, sink, top_k, window, context, gaps, seed):
    """Return columns, until and KeyVisibility of heads with one pattern, for a text whose first `context` columns are cached."""
    torch.manual_seed(seed)
    held, end = min(context, window), context + tokens
    start, prefix_slots = context - held, sink + top_k if context > window else 0
    columns = torch.cat([torch.full((prefix_slots,), -1), torch.arange(start, end)])
    until = columns + window
    until = until.expand(heads, -1).clone()
    until[:, :prefix_slots] = end
    if top_k:  # some keys stay for a while after the window, at most `top_k` at once, each replacing another
        taken = torch.full((heads, top_k), -1)
        taken[:] = torch.arange(sink, sink + top_k) if prefix_slots else -1
        for head in range(heads):
            for column in range(start + sink, end - window):
                if torch.rand(()) < 0.5:
                    slot = int(torch.randint(top_k, ()))
                    if taken[head, slot] >= 0:
                        until[head, taken[head, slot]] = column + window
                    taken[head, slot] = prefix_slots + column - start
                    until[head, prefix_slots + column - start] = end
    if not prefix_slots:
        until[:, :sink] = end
    if gaps:
        until[torch.rand(until.shape) < 0.2] = 0
    reach = until.shape[1] if top_k else prefix_slots + sink
    return columns, until, KeyVisibility(until, context, prefix_slots, start, window, gaps, sink + top_k, reach)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "how",
    [
        # heads, group, tokens, dim, sink, top_k, window, context
        (2, 2, 150, 64, 4, 0, 20, 0),
        (1, 3, 300, 32, 4, 0, 150, 0),
        (2, 1, 131, 80, 2, 5, 33, 0),
        (1, 2, 70, 128, 3, 7, 40, 90),
        (1, 2, 5, 16, 3, 7, 40, 45),
        (2, 2, 140, 16, 3, 2, 0, 0),
        (1, 1, 40, 256, 1, 0, 3, 200),
        (1, 2, 1, 64, 2, 3, 16, 77),
        (2, 2, 129, 64, 0, 0, 10**9, 0),
    ],
    ids=str,
)
def test_prefill_is_attention(device: torch.device, dtype: torch.dtype, how: tuple[int, ...]) -> None:
    heads, group, tokens, dim, *pattern, context = how
    for gaps in (False, True):
        columns, until, sight = case(heads, tokens, dim, *pattern, context, gaps, sum(how))
        check(device, dtype, heads, group, tokens, dim, columns, until, sight)


@pytest.mark.parametrize("group", [1, 3])
def test_capped_logits_and_learned_sinks(device: torch.device, group: int) -> None:
    columns, until, sight = case(2, 90, 32, 3, 4, 30, 50, True, 0)
    sink_logits = torch.randn(2 * group)
    check(device, torch.float32, 2, group, 90, 32, columns, until, sight, softcap=3.0)
    check(device, torch.float32, 2, group, 90, 32, columns, until, sight, sink_logits=sink_logits)
    check(device, torch.float32, 2, group, 90, 32, columns, until, sight, softcap=0.7, sink_logits=sink_logits)


def check(device, dtype, heads, group, tokens, dim, columns, until, sight, softcap=None, sink_logits=None) -> None:
    query = (torch.randn(1, heads * group, tokens, dim) * 2).to(device, dtype)
    keys, values = torch.randn(2, heads, until.shape[1], dim).to(device, dtype)
    moved = KeyVisibility(**{**vars(sight), "until": until.to(device)})
    sink_logits = None if sink_logits is None else sink_logits.to(device)
    found, lse = prefill.attend(query, keys, values, moved, dim**-0.5, softcap, sink_logits)
    expected, expected_lse = slow(
        query.view(heads, group, tokens, dim),
        keys,
        values,
        columns.to(device),
        until.to(device),
        sight.first,
        dim**-0.5,
        softcap,
        sink_logits,
    )
    error = TYPES[dtype]
    torch.testing.assert_close(found.double(), expected.view_as(query), atol=error, rtol=error)
    torch.testing.assert_close(lse.double(), expected_lse.view_as(lse), atol=error, rtol=error)


SOME = [Pattern(4, 9, 20), Pattern(0, 5, 0), Pattern(2, 0, 31), Pattern(4, 9, 20), Pattern(3, 0, 0), Pattern(1, 30, 7)]
BELOW_CAPACITY = Pattern(10, 100, 20)  # it keeps the whole text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "patterns"),
    [
        *((dtype, [FULL, *SOME[:3], BELOW_CAPACITY]) for dtype in TYPES),
        *((torch.float32, some) for some in (SOME, [SOME[2]] * 2, [SOME[0]], [BELOW_CAPACITY, FULL])),
    ],
    ids=lambda value: len(value) if isinstance(value, list) else str(value),
)
def test_one_launch_for_all_heads_equals_one_per_group(device, dtype, patterns, monkeypatch):
    batch, tokens, dim, more, scaling = 2, 93, 32, 41, 0.2
    query = (torch.randn(batch, 2 * len(patterns), tokens + more, dim) * 2).to(device, dtype)
    keys, values = torch.randn(2, batch, len(patterns), tokens + more, dim).to(device, dtype)
    weights = torch.randn(len(patterns), LINEAR.n_features(dim))
    read, softmax, ran = (
        prefill_cuda.read,
        AttentionParams(scaling, 5.0, torch.randn(2 * len(patterns), device=device)),
        [],
    )

    def watched(*given):
        ran.append(given[0])
        with Waiting():
            read(*given)

    monkeypatch.setattr(prefill_cuda, "read", watched)
    one, other = (
        PlanLayer(patterns, LayerOptions(weights, exact=False), prefill=PrefillOptions(dense=False)) for _ in range(2)
    )
    monkeypatch.setattr(other, "_at_once", lambda query: [])
    error = TYPES[dtype]
    for part in (slice(tokens), slice(tokens, tokens + 40), slice(tokens + 40, tokens + more)):  # and further chunks
        found, expected = (
            layer.attend(
                torch.nn.Module(), query[:, :, part], Update(layer, keys[:, :, part], values[:, :, part]), None, softmax
            )
            for layer in (one, other)
        )
        torch.testing.assert_close(found, expected, atol=error, rtol=error)
        for mine, theirs in zip(one.groups, other.groups, strict=True):
            assert (mine.length, mine.prefix_slots, mine.window) == (theirs.length, theirs.prefix_slots, theirs.window)
            assert mine.keys.shape == theirs.keys.shape
            assert torch.equal(mine.visible, theirs.visible)
            sink = slice(mine.pattern.sink)
            for ours, own in zip(mine._in_order(), theirs._in_order(), strict=True):  # rings begin at other columns
                assert torch.equal(ours, own)
            for ours, own in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                assert torch.equal(ours[:, :, sink], own[:, :, sink])
                assert torch.equal(ours.sort(2).values, own.sort(2).values)  # top-k keys are unordered
            torch.testing.assert_close(mine.scores.sort(-1).values, theirs.scores.sort(-1).values)
    assert len(ran) == any(p in SOME for p in patterns)
