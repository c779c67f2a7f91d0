"""What a layer of the cache holds and attends to equals the reference in float64, with rings that wrap many times."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from headsink import Pattern
from headsink.cache import PlanLayer, Update
from headsink.head_group import Padding
from headsink.pattern import reference_attention

SCALE, DIM = 0.5, 6
windowed = st.builds(
    Pattern, st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 2, 5, 16, 200]), st.sampled_from([0, 1, 2, 7, 20, 90])
)


def text(batch, kv_heads, group, length, seed):
    """Queries, keys, values and thresholds: of each head 20 to 60 % of the values are short, and clearly so."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    query = torch.randn(batch, kv_heads * group, length, DIM, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(batch, kv_heads, length, DIM, generator=generator, dtype=torch.float64) for _ in "kv")
    shares = torch.tensor([rng.uniform(0.2, 0.6) for _ in range(kv_heads)])
    short = torch.rand(batch, kv_heads, length, generator=generator) < shares[:, None]
    thresholds = torch.tensor([rng.uniform(0.5, 2.0) for _ in range(kv_heads)])
    norm = thresholds[:, None] * torch.where(short, 0.6, 1.5)
    return query, key, value / value.norm(dim=-1, keepdim=True) * norm[..., None], thresholds, short


def attend(layer, query, key, value, padding, start, end):
    part = slice(start, end)
    update = Update(layer, key[:, :, part], value[:, :, part])
    return layer.attend(torch.nn.Module(), query[:, :, part], update, padding, SCALE).transpose(1, 2)


def feed(layer, query, key, value, padding, sizes):
    outputs, start, sizes = [], 0, list(sizes)
    while start < query.shape[2]:
        end = min(start + (sizes.pop(0) if len(sizes) > 1 else sizes[0]), query.shape[2])
        outputs.append(attend(layer, query, key, value, padding, start, end))
        start = end
    return torch.cat(outputs, 2)


def close(output, expected, pads, start=0):
    for row, pad in enumerate(pads):
        real = slice(max(0, pad - start), None)
        torch.testing.assert_close(output[row, :, real], expected[row, :, real], rtol=0, atol=1e-12)


def padding_of(pads):
    return Padding(torch.tensor(pads), max(pads)) if any(pads) else None


WAYS = [[1000], [1], [3, 129, 1, 1, 31], [200, 1], [7], [1, 150, 13]]


@given(
    st.lists(windowed, min_size=1, max_size=3),
    st.sampled_from([1, 2]),
    st.lists(st.sampled_from([0, 0, 1, 13, 70]), min_size=1, max_size=3),
    st.sampled_from(WAYS),
    st.integers(1, 280),
    st.integers(0, 10_000),
)
@settings(max_examples=200, deadline=None)
def test_any_way_of_feeding_gives_the_reference(patterns, group, pads, sizes, length, seed):
    pads = [min(pad, length - 1) for pad in pads]
    query, key, value, thresholds, _ = text(len(pads), len(patterns), group, length, seed)
    layer = PlanLayer(patterns, thresholds, None)
    output = feed(layer, query, key, value, padding_of(pads), sizes)
    expected = reference_attention(query, key, value, patterns, thresholds, SCALE, torch.tensor(pads))
    close(output, expected, pads)


@pytest.mark.parametrize("sizes", WAYS)
@pytest.mark.parametrize("pads", [[0], [0, 40]], ids=["whole", "padded"])
@pytest.mark.parametrize("pattern", [Pattern(2, 1, 5), Pattern(0, 3, 0), Pattern(4, 16, 20)], ids=str)
def test_the_ring_of_floating_sinks_holds_the_last_ones(pattern, pads, sizes):
    query, key, value, thresholds, short = text(len(pads), 2, 2, 400, 1)
    layer = PlanLayer([pattern] * 2, thresholds, None)
    feed(layer, query, key, value, padding_of(pads), sizes)
    (group,) = layer.groups
    for row, pad in enumerate(pads):
        for head in range(2):
            left = [n for n in range(pad + pattern.sink, 400 - pattern.window) if short[row, head, n]]
            assert group.floating[row, head] == len(left) > 3 * pattern.floating
            for rank in range(len(left) - pattern.floating, len(left)):
                slot = pattern.sink + rank % pattern.floating
                assert torch.equal(group.keys[row, head, slot], key[row, head, left[rank]])
                assert torch.equal(group.values[row, head, slot], value[row, head, left[rank]])
    assert group.keys.shape[2] == pattern.sink + pattern.floating + pattern.window


@given(
    st.lists(windowed, min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 0, 13]), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(1, 150), st.floats(0, 1)), min_size=1, max_size=5),
    st.integers(0, 10_000),
)
@settings(max_examples=200, deadline=None)
def test_what_is_taken_back_leaves_no_trace(patterns, pads, steps, seed):
    """While recording: after each forward some of its tokens are taken back, and others come in their place."""
    length = 25 + sum(tokens for tokens, _ in steps)
    query, key, value, thresholds, _ = text(len(pads), len(patterns), 2, length, seed)
    layer, padding, start = PlanLayer(patterns, thresholds, None), padding_of(pads), 20
    outputs = [attend(layer, query, key, value, padding, 0, start)]
    layer.activate_past_recording()
    for n, (tokens, share) in enumerate(steps):
        right = round(share * tokens)
        parts = [text(len(pads), len(patterns), 2, tokens, seed + n + 1)[:3], (query, key, value)]
        mixed = [
            torch.cat([mine[:, :, start : start + right], wrong[:, :, right:]], 2)
            for wrong, mine in zip(*parts, strict=True)
        ]
        outputs.append(attend(layer, *mixed, padding, 0, tokens)[:, :, :right])
        layer.crop(right - tokens)
        start += right
    layer.record_past = False
    outputs.append(attend(layer, query, key, value, padding, start, length))
    expected = reference_attention(query, key, value, patterns, thresholds, SCALE, torch.tensor(pads))
    close(torch.cat(outputs, 2), expected, pads)


class Writes(TorchDispatchMode):
    """Look at every indexed write: a place that is written twice in one is undefined on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
            places = torch.stack(torch.broadcast_tensors(*(t for t in args[1] if t is not None)))
            assert places.unique(dim=1).shape == places.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", [Pattern(2, 1, 5), Pattern(0, 3, 0), Pattern(4, 16, 20)], ids=str)
def test_no_slot_is_written_twice_at_once(pattern):
    query, key, value, thresholds, _ = text(2, 2, 1, 400, 1)
    with Writes():
        feed(PlanLayer([pattern] * 2, thresholds, None), query, key, value, padding_of([0, 40]), [400])


def test_rows_that_move_take_their_ranks_along():
    patterns, pads = [Pattern(1, 2, 4), Pattern(0, 5, 0)], [0, 13, 30]
    query, key, value, thresholds, _ = text(3, 2, 2, 130, 5)
    layer = PlanLayer(patterns, thresholds, None)
    feed(layer, *(t[:, :, :100] for t in (query, key, value)), padding_of(pads), [100])
    rows = torch.tensor([2, 0, 1, 2])
    layer.reorder_cache(rows)
    query, key, value, pads = query[rows], key[rows], value[rows], [pads[row] for row in rows.tolist()]
    output = [attend(layer, query, key, value, padding_of(pads), 100, 120)]
    output += [attend(layer, query, key, value, padding_of(pads), n, n + 1) for n in range(120, 130)]
    expected = reference_attention(query, key, value, patterns, thresholds, SCALE, torch.tensor(pads))[:, :, 100:]
    close(torch.cat(output, 2), expected, pads, 100)
