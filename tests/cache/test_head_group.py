"""A cache layer's contents and attention equal the reference in float64, with rings that wrap many times."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import frozen_attention
from torch.utils._python_dispatch import TorchDispatchMode

from headsink import HeadsinkError, Pattern
from headsink.attention.interface import Update
from headsink.attention.params import AttentionParams, Padding
from headsink.attention.reference import reference_attention
from headsink.cache.head_group import QUERY_BLOCK
from headsink.cache.layer import PlanLayer
from headsink.eviction.scorers import LINEAR

SCALE, DIM = 0.5, 6
PLAIN = AttentionParams(SCALE)
windowed = st.builds(
    Pattern, st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 2, 5, 16, 200]), st.sampled_from([0, 1, 2, 7, 20, 90])
)


def text(batch, kv_heads, group, length, seed, dtype=torch.float64):
    """Return queries, keys, values and scorer weights."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, length, DIM, generator=generator, dtype=dtype)
    key, value = (torch.randn(batch, kv_heads, length, DIM, generator=generator, dtype=dtype) for _ in "kv")
    return query, key, value, torch.randn(kv_heads, LINEAR.n_features(DIM), generator=generator)


def attend(layer, query, key, value, padding, start, end, softmax=PLAIN):
    part = slice(start, end)
    update = Update(layer, key[:, :, part], value[:, :, part])
    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    return layer.attend(module, query[:, :, part], update, padding, softmax).transpose(1, 2)


def feed(layer, query, key, value, padding, sizes, softmax=PLAIN):
    outputs, start, sizes = [], 0, list(sizes)
    while start < query.shape[2]:
        end = min(start + (sizes.pop(0) if len(sizes) > 1 else sizes[0]), query.shape[2])
        outputs.append(attend(layer, query, key, value, padding, start, end, softmax))
        start = end
    return torch.cat(outputs, 2)


def close(output, expected, pads, start=0, atol=1e-12):
    for row, pad in enumerate(pads):
        real = slice(max(0, pad - start), None)
        torch.testing.assert_close(output[row, :, real], expected[row, :, real], rtol=0, atol=atol)


def padding_of(pads):
    return Padding(torch.tensor(pads), max(pads)) if any(pads) else None


WAYS = [[1000], [1], [3, 129, 1, 1, 31], [200, 1], [7], [1, 150, 13]]


@pytest.mark.slow
@given(
    st.lists(windowed, min_size=1, max_size=3),
    st.sampled_from([1, 2]),
    st.lists(st.sampled_from([0, 0, 1, 13, 70]), min_size=1, max_size=3),
    st.sampled_from(WAYS),
    st.integers(1, 280),
    st.integers(0, 10_000),
)
@settings(max_examples=200, deadline=None)
def test_any_division_into_chunks_equals_the_reference(patterns, group, pads, sizes, length, seed):
    pads = [min(pad, length - 1) for pad in pads]
    query, key, value, weights = text(len(pads), len(patterns), group, length, seed)
    layer = PlanLayer(patterns, weights)
    output = feed(layer, query, key, value, padding_of(pads), sizes)
    expected = reference_attention(query, key, value, patterns, weights, SCALE, torch.tensor(pads))
    close(output, expected, pads)


@pytest.mark.slow
@given(
    st.lists(st.one_of(windowed, st.just(Pattern())), min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 0, 13, 70]), min_size=1, max_size=2),
    st.sampled_from(WAYS),
    st.sampled_from([None, 0.7, 20.0]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(1, 600),
    st.integers(0, 10_000),
)
@settings(max_examples=100, deadline=None)
def test_logits_may_be_capped_and_some_learned(patterns, pads, sizes, softcap, some, dtype, length, seed):
    pads = [min(pad, length - 1) for pad in pads]
    query, key, value, weights = text(len(pads), len(patterns), 2, length, seed, dtype)
    sink_logits = torch.linspace(-2, 3, 2 * len(patterns)) if some else None
    layer = PlanLayer(patterns, weights)
    output = feed(layer, query, key, value, padding_of(pads), sizes, AttentionParams(SCALE, softcap, sink_logits))
    exact = (t.double() for t in (query, key, value))
    expected = reference_attention(*exact, patterns, weights, SCALE, torch.tensor(pads), softcap, sink_logits)
    close(output.double(), expected, pads, atol=1e-12 if dtype == torch.float64 else 1e-4)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that is created."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, found.numel() if isinstance(found, torch.Tensor) else 0)
        return found


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(4, 16, 100)], ids=str)
def test_capped_logits_of_a_long_text_are_not_made_at_once(pattern):
    query, key, value, weights = text(1, 2, 1, 2000, 1)
    with Largest() as largest:
        feed(PlanLayer([pattern] * 2, weights), query, key, value, None, [2000], AttentionParams(SCALE, 5.0))
    assert largest.elements <= 2 * QUERY_BLOCK * 2000


@pytest.mark.parametrize("sizes", WAYS)
@pytest.mark.parametrize("pads", [[0], [0, 40]], ids=["whole", "padded"])
@pytest.mark.parametrize("pattern", [Pattern(2, 1, 5), Pattern(0, 3, 0), Pattern(4, 16, 20)], ids=str)
def test_the_top_k_slots_hold_the_best_keys_past_the_window(pattern, pads, sizes):
    query, key, value, weights = text(len(pads), 2, 2, 400, 1)
    layer = PlanLayer([pattern] * 2, weights)
    feed(layer, query, key, value, padding_of(pads), sizes)
    (group,), scores = layer.groups, LINEAR.scores(key, value, weights)
    for row, pad in enumerate(pads):
        left = slice(pad + pattern.sink, 400 - pattern.window)
        for head in range(2):
            kept, slots = group.scores[row, head].sort(descending=True)
            best, columns = scores[row, head, left].topk(pattern.top_k)
            assert torch.equal(kept, best)
            slots, columns = slots + pattern.sink, columns + pad + pattern.sink
            assert torch.equal(group.keys[row, head, slots], key[row, head, columns])
            assert torch.equal(group.values[row, head, slots], value[row, head, columns])
    assert group.keys.shape[2] == pattern.sink + pattern.top_k + pattern.window


@pytest.mark.slow
@given(
    st.lists(windowed, min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 0, 13]), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(1, 150), st.floats(0, 1)), min_size=1, max_size=5),
    st.integers(0, 10_000),
)
@settings(max_examples=200, deadline=None)
def test_cropped_tokens_leave_no_trace(patterns, pads, steps, seed):
    """While recording: after each forward pass some of its tokens are cropped and replaced by others."""
    length = 25 + sum(tokens for tokens, _ in steps)
    query, key, value, weights = text(len(pads), len(patterns), 2, length, seed)
    layer, padding, start = PlanLayer(patterns, weights), padding_of(pads), 20
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
    expected = reference_attention(query, key, value, patterns, weights, SCALE, torch.tensor(pads))
    close(torch.cat(outputs, 2), expected, pads)


class Writes(TorchDispatchMode):
    """Check every indexed write: writing an index twice in one call is undefined on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
            places = torch.stack(torch.broadcast_tensors(*(t for t in args[1] if t is not None)))
            assert places.unique(dim=1).shape == places.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [[400], [1], [3, 129, 1, 150]])
@pytest.mark.parametrize("pattern", [Pattern(2, 1, 5), Pattern(0, 3, 0), Pattern(4, 16, 20)], ids=str)
def test_no_slot_is_written_twice_in_one_write(pattern, sizes):
    query, key, value, weights = text(2, 2, 1, 400, 1)
    with Writes():
        feed(PlanLayer([pattern] * 2, weights), query, key, value, padding_of([0, 40]), sizes)


def test_reordered_rows_keep_their_scores():
    patterns, pads = [Pattern(1, 2, 4), Pattern(0, 5, 0)], [0, 13, 30]
    query, key, value, weights = text(3, 2, 2, 130, 5)
    layer = PlanLayer(patterns, weights)
    feed(layer, *(t[:, :, :100] for t in (query, key, value)), padding_of(pads), [100])
    rows = torch.tensor([2, 0, 1, 2])
    layer.reorder_cache(rows)
    query, key, value, pads = query[rows], key[rows], value[rows], [pads[row] for row in rows.tolist()]
    output = [attend(layer, query, key, value, padding_of(pads), 100, 120)]
    output += [attend(layer, query, key, value, padding_of(pads), n, n + 1) for n in range(120, 130)]
    expected = reference_attention(query, key, value, patterns, weights, SCALE, torch.tensor(pads))[:, :, 100:]
    close(torch.cat(output, 2), expected, pads, 100)


# freeze


@pytest.mark.slow
@given(
    st.lists(st.one_of(windowed, st.just(Pattern())), min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 0, 13, 70]), min_size=1, max_size=2),
    st.sampled_from(WAYS),
    st.integers(0, 250),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 150), st.floats(0, 1)), min_size=1, max_size=5),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 10_000),
)
@settings(max_examples=200, deadline=None)
def test_a_frozen_layer_evicts_only_cropped_tokens(patterns, pads, sizes, freeze, recording, steps, dtype, seed):
    length = freeze + sum(tokens for tokens, _ in steps) + 3
    pads = [min(pad, length - 1) for pad in pads]
    query, key, value, weights = text(len(pads), len(patterns), 2, length, seed, dtype)
    layer, padding, start, outputs = PlanLayer(patterns, weights), padding_of(pads), freeze, []
    if freeze:
        if recording:
            layer.activate_past_recording()
        outputs = [feed(layer, *(t[:, :, :freeze] for t in (query, key, value)), padding, sizes)]
    layer.freeze()
    for n, (tokens, share) in enumerate(steps):
        right = round(share * tokens)
        parts = zip(
            text(len(pads), len(patterns), 2, tokens, seed + n + 1, dtype)[:3], (query, key, value), strict=True
        )
        mixed = [torch.cat([mine[:, :, start : start + right], wrong[:, :, right:]], 2) for wrong, mine in parts]
        outputs.append(attend(layer, *mixed, padding, 0, tokens)[:, :, :right])
        layer.crop(right - tokens)
        start += right
        layer.freeze()  # a second call changes nothing
    outputs += [attend(layer, query, key, value, padding, n, n + 1) for n in range(start, start + 3)]
    query, key, value = (t[:, :, : start + 3] for t in (query, key, value))
    expected = frozen_attention(query, key, value, patterns, weights, SCALE, torch.tensor(pads), freeze)
    close(torch.cat(outputs, 2), expected, pads, atol=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("pattern", [Pattern(2, 1, 5), Pattern(0, 0, 0), Pattern(0, 3, 90)], ids=str)
def test_tokens_cached_before_freeze_cannot_be_cropped(pattern):
    query, key, value, weights = text(1, 2, 1, 60, 1)
    layer = PlanLayer([pattern] * 2, weights)
    attend(layer, query, key, value, None, 0, 50)
    layer.freeze()
    attend(layer, query, key, value, None, 50, 60)
    layer.crop(-3)
    with pytest.raises(HeadsinkError, match=r"cannot take back 8 tokens: freeze\(\) was called 7 tokens ago"):
        layer.crop(-8)


def test_rows_reordered_after_freeze_keep_everything():
    patterns, pads = [Pattern(1, 2, 4), Pattern(0, 5, 0), Pattern()], [0, 13, 30]
    query, key, value, weights = text(3, 3, 2, 130, 5)
    layer = PlanLayer(patterns, weights)
    feed(layer, *(t[:, :, :60] for t in (query, key, value)), padding_of(pads), [50, 1])
    layer.freeze()
    attend(layer, query, key, value, padding_of(pads), 60, 100)
    rows = torch.tensor([2, 0, 1, 2])
    layer.reorder_cache(rows)
    query, key, value, pads = query[rows], key[rows], value[rows], [pads[row] for row in rows.tolist()]
    output = [attend(layer, query, key, value, padding_of(pads), 100, 120)]
    output += [attend(layer, query, key, value, padding_of(pads), n, n + 1) for n in range(120, 130)]
    expected = frozen_attention(query, key, value, patterns, weights, SCALE, torch.tensor(pads), 60)[:, :, 100:]
    close(torch.cat(output, 2), expected, pads, 100)


def test_a_reset_layer_evicts_again():
    query, key, value, weights = text(1, 1, 1, 60, 1)
    layer = PlanLayer([Pattern(1, 2, 5)], weights)
    layer.freeze()
    attend(layer, query, key, value, None, 0, 60)
    assert layer.groups[0].keys.shape[2] >= 60
    layer.reset()
    attend(layer, query, key, value, None, 0, 60)
    assert layer.groups[0].keys.shape[2] == 8


def simulate_head(query, key, value, pattern, weights, pad, hidden, start_hidden):
    """Simulate one head of a row key by key: attention without the columns `hidden` from column `start_hidden` on.

    Before that they are visible tokens; after that they still occupy slots of the window.
    """
    scores = LINEAR.scores(key[None, None], value[None, None], weights[None])[0, 0]
    window = len(key) if pattern.window is None else pattern.window
    sinks, top, ring, out = [], [], [], []
    for column in range(len(key)):
        hidden_now = set(hidden) if column >= start_hidden else set()
        if column >= pad:
            ring.append(column)
        while ring and ring[0] <= column - window:
            left = ring.pop(0)
            if left - pad < pattern.sink:
                sinks.append(left)
            elif pattern.top_k and left not in hidden_now:
                top = sorted([*(t for t in top if t not in hidden_now), left], key=lambda t: -scores[t])[
                    : pattern.top_k
                ]
        seen = [t for t in sinks + top + ring if t not in hidden_now]
        logits = key[seen] @ query[column] * SCALE
        out.append(logits.softmax(0) @ value[seen] if seen else torch.zeros_like(query[column]))
    return torch.stack(out)


@pytest.mark.slow
@given(
    st.lists(st.one_of(windowed, st.just(Pattern())), min_size=1, max_size=3),
    st.sampled_from([0, 3]),
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([[1], [5, 1], [40, 1, 30]]),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_columns_between_tokens_can_be_hidden(patterns, pad, end, count, sizes, dtype, seed):
    """A row of a batch whose turn ended early: the tokens appended after its end are hidden when the next turn starts."""
    start_hidden = end + count + 2
    length, pad = start_hidden + 60, min(pad, end - 1)
    query, key, value, weights = text(2, len(patterns), 1, length, seed, dtype)
    layer, pads = PlanLayer(patterns, weights), torch.tensor([0, pad])
    before = Padding(pads, pad) if pad else None
    outputs = [attend(layer, query, key, value, before, 0, start_hidden)]
    hidden = torch.zeros(2, length, dtype=torch.bool)
    hidden[1, end : end + count] = True
    start, sizes = start_hidden, list(sizes)
    late = [
        p
        for p in patterns
        if p.top_k and p.size(start_hidden) < start_hidden
        for column in range(end, end + count)
        if column < start_hidden - (p.window or 0) and column - pad >= p.sink
    ]
    if late:
        with pytest.raises(HeadsinkError, match="may be among the top-k keys"):
            attend(
                layer,
                query,
                key,
                value,
                Padding(pads, pad, hidden[:, : start_hidden + 1]),
                start_hidden,
                start_hidden + 1,
            )
        return
    while start < length:
        size = min(sizes.pop(0) if len(sizes) > 1 else sizes[0], length - start)
        mask = Padding(pads, pad, hidden[:, : start + size])
        outputs.append(attend(layer, query, key, value, mask, start, start + size))
        start += size
    output = torch.cat(outputs, 2).double()
    for row in range(2):
        columns = range(end, end + count) if row else []
        for head, pattern in enumerate(patterns):
            exact = (t[row, head].double() for t in (query, key, value))
            expected = simulate_head(*exact, pattern, weights[head].double(), int(pads[row]), columns, start_hidden)
            found = output[row, head, int(pads[row]) :]
            atol = 1e-12 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(found, expected[int(pads[row]) :], rtol=0, atol=atol)
