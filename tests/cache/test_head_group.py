"""A cache layer's contents and attention equal the reference in float64, with rings that wrap many times."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from headsink import HeadsinkError, Pattern
from headsink.attention.interface import Update
from headsink.attention.params import AttentionParams, Padding
from headsink.attention.reference import reference_attention, reference_refit
from headsink.cache.head_group import QUERY_BLOCK
from headsink.cache.layer import PlanLayer
from headsink.cache.options import LayerOptions
from headsink.cache.segments import PrefillOptions
from headsink.eviction.scorers import ALWAYS, LINEAR
from headsink.eviction.scorers.prompt import LEAST, segment_scores
from headsink.models.rope import Rotary

SCALE, DIM = 0.5, 6
PLAIN = AttentionParams(SCALE)
SPARSE = PrefillOptions(dense=False)
ROTARY = Rotary(torch.tensor([0.9, 0.2, 0.05], dtype=torch.float64))  # for prompt scores
PREFILLS = {
    "dense": PrefillOptions(),
    "dense with prompt scores": PrefillOptions(rotary=ROTARY),
    "dense in chunks": PrefillOptions(chunk_size=48, rotary=ROTARY),
    "sparse": SPARSE,
}
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


def segments_of(sizes, length, prefill=PREFILLS["dense"], begin=0):
    """Return the tokens of each segment of a text that is fed in calls of `sizes`, the last of which repeats."""
    calls, sizes, segments = [], list(sizes), []
    while sum(calls) < length:
        calls.append(min(sizes.pop(0) if len(sizes) > 1 else sizes[0], length - sum(calls)))
    for call in calls:
        while call:
            at = begin + sum(segments)
            chunk = prefill.chunk_size or call
            segments.append(min(call, chunk - at % chunk if prefill.chunk_size else call) if prefill.dense else 1)
            call -= segments[-1]
    return segments


def expected_attention(
    query,
    key,
    value,
    patterns,
    weights,
    pads,
    sizes,
    prefill=PREFILLS["dense"],
    frozen=None,
    softmax=PLAIN,
    decode_window=0,
):
    """The reference for a text that is fed in calls of `sizes`."""
    return reference_attention(
        query,
        key,
        value,
        patterns,
        weights,
        softmax.scaling,
        torch.tensor(pads),
        softmax.softcap,
        softmax.sink_logits,
        segments=segments_of(sizes, query.shape[2], prefill),
        rotary=prefill.rotary if prefill.dense else None,
        frozen=frozen,
        decode_window=decode_window,
    )


WINDOWS = st.sampled_from([0, 4, 25, 60])  # while decoding
WAYS = [[1000], [1], [3, 129, 1, 1, 31], [200, 1], [7], [1, 150, 13]]


@pytest.mark.slow
@given(
    st.lists(windowed, min_size=1, max_size=3),
    st.sampled_from([1, 2]),
    st.lists(st.sampled_from([0, 0, 1, 13, 70]), min_size=1, max_size=3),
    st.sampled_from(WAYS),
    st.sampled_from(list(PREFILLS.values())),
    WINDOWS,
    st.integers(1, 280),
    st.integers(0, 10_000),
)
@settings(max_examples=250)
def test_any_division_into_chunks_equals_the_reference(patterns, group, pads, sizes, prefill, window, length, seed):
    pads = [min(pad, length - 1) for pad in pads]
    query, key, value, weights = text(len(pads), len(patterns), group, length, seed)
    layer = PlanLayer(patterns, LayerOptions(weights, decode_window=window), prefill)
    output = feed(layer, query, key, value, padding_of(pads), sizes)
    expected = expected_attention(query, key, value, patterns, weights, pads, sizes, prefill, decode_window=window)
    close(output, expected, pads)


@pytest.mark.slow
@given(
    st.lists(st.one_of(windowed, st.just(Pattern())), min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 0, 13, 70]), min_size=1, max_size=2),
    st.sampled_from(WAYS),
    st.sampled_from(list(PREFILLS.values())),
    st.sampled_from([None, 0.7, 20.0]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(1, 600),
    st.integers(0, 10_000),
)
@settings(max_examples=150)
def test_logits_may_be_capped_and_some_learned(patterns, pads, sizes, prefill, softcap, some, dtype, length, seed):
    pads = [min(pad, length - 1) for pad in pads]
    query, key, value, weights = text(len(pads), len(patterns), 2, length, seed, dtype)
    sink_logits = torch.linspace(-2, 3, 2 * len(patterns)) if some else None
    softmax = AttentionParams(SCALE, softcap, sink_logits)
    output = feed(
        PlanLayer(patterns, LayerOptions(weights), prefill=prefill), query, key, value, padding_of(pads), sizes, softmax
    )
    exact = [t.double() for t in (query, key, value)]
    expected = expected_attention(*exact, patterns, weights, pads, sizes, prefill, softmax=softmax)
    close(output.double(), expected, pads, atol=1e-12 if dtype == torch.float64 else 1e-4)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that is created."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, found.numel() if isinstance(found, torch.Tensor) else 0)
        return found


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(4, 16, 100)], ids=str)
def test_logits_of_a_long_text_are_not_made_at_once(pattern, prefill, softcap):
    query, key, value, weights = text(1, 2, 1, 2000, 1)
    layer = PlanLayer([pattern] * 2, LayerOptions(weights), prefill=PREFILLS[prefill])
    with torch.no_grad(), Largest() as largest:
        feed(layer, query, key, value, None, [1500, 500], AttentionParams(SCALE, softcap))
    assert largest.elements <= 2 * QUERY_BLOCK * 2000


@pytest.mark.parametrize(
    ("prefill", "sizes"),
    [
        *(("dense", sizes) for sizes in WAYS),
        *(("sparse", sizes) for sizes in WAYS[:1] + WAYS[2:4]),
        ("dense with prompt scores", [400]),
    ],
    ids=str,
)
@pytest.mark.parametrize("pads", [[0], [0, 40]], ids=["whole", "padded"])
@pytest.mark.parametrize("pattern", [Pattern(2, 1, 5), Pattern(0, 3, 0), Pattern(4, 16, 20)], ids=str)
def test_the_top_k_slots_hold_the_best_keys_past_the_window(pattern, pads, prefill, sizes):
    query, key, value, weights = text(len(pads), 2, 2, 400, 1)
    layer = PlanLayer([pattern] * 2, LayerOptions(weights), prefill=PREFILLS[prefill])
    feed(layer, query, key, value, padding_of(pads), sizes)
    (group,), scores = layer.groups, LINEAR.scores(key, value, weights)
    if PREFILLS[prefill].rotary is not None:
        scores = segment_scores(query, key, scores, torch.tensor(pads), (SCALE, None, None), ROTARY)
    for row, pad in enumerate(pads):
        left = slice(pad + pattern.sink, 400 - pattern.window)
        for head in range(2):
            kept, slots = group.scores[row, head].sort(descending=True)
            best, columns = scores[row, head, left].topk(pattern.top_k)
            columns, expected = columns + pad + pattern.sink, (key[row, head], value[row, head])
            if PREFILLS[prefill].rotary is not None:
                some = query[row].unflatten(0, (2, -1))[head]
                expected = refit(some, *expected, scores[row, head], pattern, pad, 400, ROTARY)
                if pattern.top_k > 1:  # the last of the top-k keys is synthetic, and never evicted
                    best, columns = best.roll(1), columns.roll(1)
                    best[0] = ALWAYS
            torch.testing.assert_close(kept, best, rtol=0, atol=1e-9)
            for found, right in zip((group.keys, group.values), expected, strict=True):
                found, right = found[row, head, slots + pattern.sink], right[columns]
                torch.testing.assert_close(
                    found, right, rtol=0, atol=1e-9 if PREFILLS[prefill].rotary is not None else 0
                )
    assert group.keys.shape[2] == pattern.sink + pattern.top_k + pattern.window


@pytest.mark.slow
@given(
    st.lists(windowed, min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 0, 13]), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(1, 150), st.floats(0, 1)), min_size=1, max_size=5),
    st.sampled_from(list(PREFILLS.values())),
    WINDOWS,
    st.integers(0, 10_000),
)
@example([Pattern(0, 200, 0)], [0], [(26, 0.0), (150, 0.0)], PREFILLS["dense in chunks"], 0, 0)  # eviction had begun
@settings(max_examples=200)
def test_cropped_tokens_leave_no_trace(patterns, pads, steps, prefill, window, seed):
    """While recording: after each forward pass some of its tokens are cropped and replaced by others."""
    length = 65 + sum(tokens for tokens, _ in steps)
    query, key, value, weights = text(len(pads), len(patterns), 2, length, seed)
    layer = PlanLayer(patterns, LayerOptions(weights, decode_window=window), prefill)
    padding, start = padding_of(pads), 60
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
    sizes = [60, *[1] * (start - 60), length - start]
    expected = expected_attention(query, key, value, patterns, weights, pads, sizes, prefill, decode_window=window)
    close(torch.cat(outputs, 2), expected, pads)


@pytest.mark.parametrize("window", [0, 25])
@pytest.mark.parametrize("prefill", PREFILLS)
def test_a_recorded_prompt_is_one_segment(prefill, window):
    """Of a cache that records from the start; later calls are read token by token."""
    patterns, length, prefill = [Pattern(1, 5, 9), Pattern(0, 30, 0), Pattern(2, 0, 20)], 150, PREFILLS[prefill]
    query, key, value, weights = text(2, 3, 2, length, 1)
    layer, padding = PlanLayer(patterns, LayerOptions(weights, decode_window=window), prefill), padding_of([0, 13])
    layer.activate_past_recording()
    outputs = [feed(layer, *(t[:, :, :111] for t in (query, key, value)), padding, [100, 1, 10])]
    wrong = text(2, 3, 2, 150, 2)[:3]
    attend(layer, *wrong, padding, 111, 118)
    layer.crop(-7)
    outputs.append(attend(layer, query, key, value, padding, 111, length))
    one_segment = PrefillOptions(prefill.dense, None, prefill.rotary)
    sizes = [100, *[1] * (length - 100)]
    expected = expected_attention(
        query, key, value, patterns, weights, [0, 13], sizes, one_segment, decode_window=window
    )
    close(torch.cat(outputs, 2), expected, [0, 13])


class Writes(TorchDispatchMode):
    """Check every indexed write: writing an index twice in one call is undefined on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
            places = torch.stack(torch.broadcast_tensors(*(t for t in args[1] if t is not None)))
            assert places.unique(dim=1).shape == places.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("sizes", [[400], [1], [3, 129, 1, 150]], ids=str)
@pytest.mark.parametrize("pattern", [Pattern(2, 1, 5), Pattern(0, 3, 0), Pattern(4, 16, 20)], ids=str)
def test_no_slot_is_written_twice_in_one_write(pattern, sizes, prefill):
    query, key, value, weights = text(2, 2, 1, 400, 1)
    if sizes == [1]:
        query, key, value = (t[:, :, :60] for t in (query, key, value))
    layer = PlanLayer([pattern] * 2, LayerOptions(weights), prefill=PREFILLS[prefill])
    with Writes():
        feed(layer, query, key, value, padding_of([0, 40]), sizes)


@pytest.mark.parametrize("prefill", PREFILLS)
def test_reordered_rows_keep_their_scores(prefill):
    patterns, pads = [Pattern(1, 2, 4), Pattern(0, 5, 0)], [0, 13, 30]
    query, key, value, weights = text(3, 2, 2, 130, 5)
    layer = PlanLayer(patterns, LayerOptions(weights), prefill=PREFILLS[prefill])
    feed(layer, *(t[:, :, :100] for t in (query, key, value)), padding_of(pads), [100])
    rows = torch.tensor([2, 0, 1, 2])
    layer.reorder_cache(rows)
    query, key, value, pads = query[rows], key[rows], value[rows], [pads[row] for row in rows.tolist()]
    output = [attend(layer, query, key, value, padding_of(pads), 100, 120)]
    output += [attend(layer, query, key, value, padding_of(pads), n, n + 1) for n in range(120, 130)]
    sizes = [100, 20, *[1] * 10]
    expected = expected_attention(query, key, value, patterns, weights, pads, sizes, PREFILLS[prefill])[:, :, 100:]
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
    st.sampled_from(list(PREFILLS.values())),
    st.sampled_from([torch.float64, torch.float32]),
    WINDOWS,
    st.integers(0, 10_000),
)
@settings(max_examples=200)
def test_a_frozen_layer_evicts_only_cropped_tokens(
    patterns, pads, sizes, freeze, recording, steps, prefill, dtype, window, seed
):
    length = freeze + sum(tokens for tokens, _ in steps) + 3
    pads = [min(pad, length - 1) for pad in pads]
    query, key, value, weights = text(len(pads), len(patterns), 2, length, seed, dtype)
    layer = PlanLayer(patterns, LayerOptions(weights, decode_window=window), prefill)
    padding, start, outputs = padding_of(pads), freeze, []
    before = segments_of(sizes, freeze, prefill)
    if recording and prefill.dense:  # after the first call, token by token
        first = [min(sizes[0], freeze)]
        before = first + [1] * (freeze - sum(first))
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
    rest = PrefillOptions(rotary=prefill.rotary if prefill.dense else None)
    expected = expected_attention(
        query, key, value, patterns, weights, pads, [*before, start + 3 - freeze], rest, freeze, decode_window=window
    )
    close(torch.cat(outputs, 2), expected, pads, atol=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("pattern", [Pattern(2, 1, 5), Pattern(0, 0, 0), Pattern(0, 3, 90)], ids=str)
def test_tokens_cached_before_freeze_cannot_be_cropped(pattern):
    query, key, value, weights = text(1, 2, 1, 60, 1)
    layer = PlanLayer([pattern] * 2, LayerOptions(weights))
    attend(layer, query, key, value, None, 0, 50)
    layer.freeze()
    attend(layer, query, key, value, None, 50, 60)
    layer.crop(-3)
    with pytest.raises(HeadsinkError, match=r"cannot take back 8 tokens: freeze\(\) was called 7 tokens ago"):
        layer.crop(-8)


@pytest.mark.parametrize("prefill", PREFILLS)
def test_rows_reordered_after_freeze_keep_everything(prefill):
    patterns, pads = [Pattern(1, 2, 4), Pattern(0, 5, 0), Pattern()], [0, 13, 30]
    query, key, value, weights = text(3, 3, 2, 130, 5)
    layer, prefill = PlanLayer(patterns, LayerOptions(weights), prefill=PREFILLS[prefill]), PREFILLS[prefill]
    feed(layer, *(t[:, :, :60] for t in (query, key, value)), padding_of(pads), [50, 1])
    layer.freeze()
    attend(layer, query, key, value, padding_of(pads), 60, 100)
    rows = torch.tensor([2, 0, 1, 2])
    layer.reorder_cache(rows)
    query, key, value, pads = query[rows], key[rows], value[rows], [pads[row] for row in rows.tolist()]
    output = [attend(layer, query, key, value, padding_of(pads), 100, 120)]
    output += [attend(layer, query, key, value, padding_of(pads), n, n + 1) for n in range(120, 130)]
    sizes = [50, *[1] * 10, 40, 20, *[1] * 10]
    expected = expected_attention(query, key, value, patterns, weights, pads, sizes, prefill, 60)[:, :, 100:]
    close(torch.cat(output, 2), expected, pads, 100)


def test_a_reset_layer_evicts_again():
    query, key, value, weights = text(1, 1, 1, 60, 1)
    layer = PlanLayer([Pattern(1, 2, 5)], LayerOptions(weights))
    layer.freeze()
    attend(layer, query, key, value, None, 0, 60)
    assert layer.groups[0].keys.shape[2] >= 60
    layer.reset()
    attend(layer, query, key, value, None, 0, 60)
    assert layer.groups[0].keys.shape[2] == 8


def simulate_head(query, key, value, scores, own, pattern, segments, pad, hidden, start_hidden, rotary):
    """Simulate one head of a row key by key: attention without the columns `hidden` from column `start_hidden` on.

    Before that they are visible tokens; after that they still occupy slots of the window. scores, own: importance of the keys,
    and that by which they are ranked if they leave the window at the end of their segment. rotary: of prompt scores, after which
    top-k keys are refitted.
    """
    window = len(key) if pattern.window is None else pattern.window
    sinks, top, ring, out, begin = [], [], [], [], 0

    def evict(begin, end):
        while ring and ring[0] < end - window:
            left = ring.pop(0)
            if left - pad < pattern.sink:
                sinks.append(left)
            elif pattern.top_k and left not in hidden_now:
                kept = [(rank, t) for rank, t in top if t not in hidden_now]
                rank = (own if left >= begin and pattern.size(end) < end else scores)[left]
                top[:] = sorted([*kept, (float(rank), left)])[-pattern.top_k :]

    for size in segments:
        end = begin + size
        hidden_now = set(hidden) if begin >= start_hidden else set()
        ring += range(max(begin, pad), end)
        if size == 1:
            evict(begin, end)
        for column in range(begin, end):
            held = [t for t in sinks + [t for _, t in top] + ring if t not in hidden_now and t <= column]
            logits = key[held] @ query[column] * SCALE
            out.append(logits.softmax(0) @ value[held] if held else torch.zeros_like(query[column]))
        if size > 1:
            evict(begin, end)
        if begin == 0 and rotary is not None and size - pad >= LEAST and pattern.size(size - pad) < size - pad:
            key, value = refit(query[None], key, value, own, pattern, pad, end, rotary)
            if len(top) > 1:  # the last of the top-k keys is synthetic, and never evicted
                top[0] = ALWAYS, top[0][1]
                top.sort()
        begin = end
    return torch.stack(out)


def refit(query, key, value, scores, pattern, pad, end, rotary):
    """Return the keys and values of a row after refitting of its columns from `pad` to `end`."""
    own = slice(pad, end)
    if not pattern.top_k:
        return key, value
    found = reference_refit(query[:, own], key[own], value[own], scores[own], pattern, (SCALE, None, None), rotary)
    return tuple(torch.cat([given[:pad], new, given[end:]]) for given, new in zip((key, value), found, strict=False))


@pytest.mark.slow
@given(
    st.lists(st.one_of(windowed, st.just(Pattern())), min_size=1, max_size=3),
    st.sampled_from([0, 3]),
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([[1], [5, 1], [40, 1, 30]]),
    st.sampled_from(list(PREFILLS.values())),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 10_000),
)
@settings(max_examples=200)
def test_columns_between_tokens_can_be_hidden(patterns, pad, end, count, sizes, prefill, dtype, seed):
    """A row of a batch whose turn ended early: the tokens appended after its end are hidden when the next turn starts."""
    start_hidden = end + count + 2
    length, pad = start_hidden + 60, min(pad, end - 1)
    query, key, value, weights = text(2, len(patterns), 1, length, seed, dtype)
    layer, pads = PlanLayer(patterns, LayerOptions(weights), prefill=prefill), torch.tensor([0, pad])
    before = Padding(pads, pad) if pad else None
    outputs = [attend(layer, query, key, value, before, 0, start_hidden)]
    hidden = torch.zeros(2, length, dtype=torch.bool)
    hidden[1, end : end + count] = True
    start, segments = start_hidden, segments_of([start_hidden, *sizes], length, prefill)
    sizes = list(sizes)
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
    query, key, value = (t.double() for t in (query, key, value))
    scores = LINEAR.scores(key, value, weights)
    own, begin = scores.clone(), 0
    for size in segments:
        part = slice(begin, begin + size)
        found = None
        if prefill.dense:
            given = query[:, :, part], key[:, :, part], scores[:, :, part], (pads - begin).clamp(0, size)
            found = segment_scores(*given, (SCALE, None, None), prefill.rotary)
        own[:, :, part], begin = scores[:, :, part] if found is None else found, begin + size
    for row in range(2):
        columns = range(end, end + count) if row else []
        for head, pattern in enumerate(patterns):
            one = [t[row, head] for t in (query, key, value, scores, own)]
            expected = simulate_head(*one, pattern, segments, int(pads[row]), columns, start_hidden, prefill.rotary)
            found = output[row, head, int(pads[row]) :]
            atol = 1e-12 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(found, expected[int(pads[row]) :], rtol=0, atol=atol)
