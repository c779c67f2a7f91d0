"""Prefill attention on a GPU: many queries, each over the keys that it sees. Keys that no query of a block sees are skipped.

A program handles up to 128 queries of one head. Sink tokens and top-k keys (far keys) are not contiguous, so a first, small
launch lists them for every block, and the main kernel gathers them. The keys of the window are contiguous; those that all
queries of a block see need no mask. The softmax is computed online (FlashAttention-2, arXiv 2307.08691).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headsink.attention.cuda.common import LOG2E, cap, product
from headsink.attention.visibility import HeadVisibility, KeyVisibility, check_sight
from headsink.errors import must_be
from headsink.utils.device import on_card

SCAN = 1024  # keys per step of the search for far keys
# Arguments that change from text to text and must not trigger recompilation.
ANY = ["first", "prefix_slots", "start", "n_keys", "tokens"]
# Fields per KV head: window, reach of the far keys, largest number of far keys of a query, start of the lists.
WINDOW, REACH, MOST, LISTS, OWN = (tl.constexpr(n) for n in range(5))


class Shape(NamedTuple):
    """Queries and keys per tile, warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def shape(dim: int, dtype: torch.dtype) -> Shape:
    """Return the tile shape for heads of size `dim`: close to PyTorch's FlexAttention on an H100, without register spills."""
    if dtype == torch.float32:
        return Shape(32, 32, 8, 2) if dim <= 128 else Shape(16, 16, 8, 2)
    if dim <= 64:
        return Shape(128, 128, 8, 3)
    return Shape(128, 64, 8, 3) if dim <= 128 else Shape(64, 32, 4, 3)


@triton.jit
def _window_start(begin, prefix_slots, start, window, n_keys):
    """Return the first contiguous key that a block sees. begin: the column of its first query."""
    first = prefix_slots + begin - tl.maximum(window, 1) + 1 - start
    return tl.minimum(tl.maximum(first, prefix_slots), n_keys)


@triton.jit(do_not_specialize=ANY)
def _list(until, lists, counts, table, first, prefix_slots, start, n_keys, QUERIES: tl.constexpr, SOME: tl.constexpr):
    """List the far keys that any query of a block sees, in order."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = first + block * QUERIES
    table += head * OWN
    window, reach, most = (
        tl.load(table + WINDOW).to(tl.int32),
        tl.load(table + REACH).to(tl.int32),
        tl.load(table + MOST),
    )
    end = tl.minimum(_window_start(begin, prefix_slots, start, window, n_keys), reach)
    lists += tl.load(table + LISTS) + block * most
    some, count = tl.arange(0, SOME), 0
    for offset in range(0, end, SOME):
        key = offset + some
        seen = tl.load(until + head * n_keys + key, key < end, other=0) > begin
        number = count + tl.cumsum(seen.to(tl.int32)) - 1
        tl.store(lists + number, key, seen & (number < most))
        count += tl.sum(seen.to(tl.int32))
    tl.store(counts + head * tl.num_programs(0) + block, tl.minimum(count, most.to(tl.int32)))


@triton.jit
def _attend_tile(
    state, block, key, valid, columns, dim: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr
):
    """Attend from all queries of a block to one tile of keys, and return the new state.

    state: largest logits, sums, outputs. block: the arguments that are the same for all tiles. key, valid, columns: [KEYS], key
    numbers, whether they are valid, and their columns.
    """
    queries, keys, values, until, now, scaling, softcap, unit = block
    top, sum_, out = state
    column = tl.arange(0, DIM)
    offset = key[:, None] * dim + column[None, :]
    inside = valid[:, None] & (column < dim)[None, :]
    its_keys, its_values = tl.load(keys + offset, inside, other=0.0), tl.load(values + offset, inside, other=0.0)
    logits = product(queries, tl.trans(its_keys), tl.zeros([queries.shape[0], key.shape[0]], tl.float32))
    if CAPPED:
        logits = cap(logits * scaling, softcap)
    if MASKED:
        ends = tl.load(until + key, valid, other=0)
        seen = (columns[None, :] <= now[:, None]) & (now[:, None] < ends[None, :])
        logits = tl.where(seen, logits, float("-inf"))
    most = tl.maximum(top, tl.max(logits, 1))
    finite = tl.where(most == float("-inf"), 0.0, most)
    # Scaling inside the exponent saves one instruction per logit.
    shares = tl.exp2(logits * unit - (finite * unit)[:, None])
    factor = tl.exp2((top - finite) * unit)
    out = product(shares.to(queries.dtype), its_values, out * factor[:, None])
    return most, sum_ * factor + tl.sum(shares, 1), out


@triton.jit(do_not_specialize=ANY)
def _attend_block(
    query,
    keys,
    values,
    until,
    lists,
    counts,
    table,
    sink_logits,
    output,
    lse,
    first,
    prefix_slots,
    start,
    n_keys,
    tokens,
    scaling,
    softcap,
    GROUP: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    dim: tl.constexpr,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    GAPS: tl.constexpr,
    CAPPED: tl.constexpr,
    LEARNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the largest blocks start first
    query_head = tl.program_id(1).to(tl.int64)
    head = query_head // GROUP
    keys += head * n_keys * dim
    values += head * n_keys * dim
    until += head * n_keys
    table += head * OWN
    window = tl.load(table + WINDOW).to(tl.int32)
    lists += tl.load(table + LISTS) + block * tl.load(table + MOST)
    row, column, some = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, DIM), tl.arange(0, KEYS)
    inside = (row < tokens)[:, None] & (column < dim)[None, :]
    at = (query_head * tokens + row)[:, None] * dim + column[None, :]
    queries = tl.load(query + at, inside, other=0.0)
    begin = first + block * QUERIES
    last = tl.minimum(begin + QUERIES, first + tokens) - 1
    now = first + row
    unit = scaling * LOG2E  # positive; scales logits in the exponent of 2, unless they are capped
    if CAPPED:
        unit = tl.cast(LOG2E, tl.float32)
    state = (
        tl.full([QUERIES], float("-inf"), tl.float32),
        tl.zeros([QUERIES], tl.float32),
        tl.zeros([QUERIES, DIM], tl.float32),
    )

    same = (queries, keys, values, until, now, scaling, softcap, unit)
    far = tl.load(counts + head * tl.num_programs(0) + block)
    for offset in tl.range(0, far, KEYS, num_stages=STAGES):
        valid = offset + some < far
        key = tl.load(lists + offset + some, valid, other=0)
        never = tl.full([KEYS], -1, tl.int32)  # far keys precede every query
        state = _attend_tile(state, same, key, valid, never, dim, DIM, True, CAPPED)

    near = _window_start(begin, prefix_slots, start, window, n_keys)
    end = tl.minimum(prefix_slots + last + 1 - start, n_keys)
    # Whole tiles that every query sees: inside the window of the last query, and not after the first query.
    unmasked_from, unmasked_to = near, near
    if not GAPS:
        low = tl.maximum(near, prefix_slots + last - tl.maximum(window, 1) + 1 - start)
        unmasked_from = near + tl.cdiv(low - near, KEYS) * KEYS
        unmasked_to = unmasked_from + tl.maximum(prefix_slots + begin + 1 - start - unmasked_from, 0) // KEYS * KEYS
    for offset in tl.range(near, tl.minimum(unmasked_from, end), KEYS, num_stages=STAGES):
        key = offset + some
        state = _attend_tile(state, same, key, key < end, key - prefix_slots + start, dim, DIM, True, CAPPED)
    for offset in tl.range(unmasked_from, unmasked_to, KEYS, num_stages=STAGES):
        key = offset + some
        state = _attend_tile(state, same, key, key < n_keys, key, dim, DIM, False, CAPPED)
    for offset in tl.range(unmasked_to, end, KEYS, num_stages=STAGES):
        key = offset + some
        state = _attend_tile(state, same, key, key < end, key - prefix_slots + start, dim, DIM, True, CAPPED)

    top, sum_, out = state
    finite = tl.where(top == float("-inf"), 0.0, top)
    divisor = sum_
    if LEARNED:
        extra = tl.load(sink_logits + query_head % QUERY_HEADS).to(tl.float32) * LOG2E
        divisor += tl.exp2(extra - finite * unit)
    divisor = tl.where(sum_ == 0.0, 1.0, divisor)
    tl.store(output + at, (out / divisor[:, None]).to(output.dtype.element_ty), inside)
    tl.store(lse + query_head * tokens + row, (finite * unit + tl.log2(sum_)) / LOG2E, row < tokens)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sight: KeyVisibility,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    tile: Shape | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from many tokens, each over the keys that it sees.

    query: [batch, heads x group, tokens, dim]; keys, values: [batch x heads, keys, dim]; softcap, sink_logits: as for
    `decode.attend`. Returns the output, zero where no key is visible, and the log-sum-exp of the logits, float32 [batch, heads x
    group, tokens].
    """
    batch, query_heads, tokens, dim = query.shape
    heads, n_keys = keys.shape[:2]
    check_sight(query, keys, values, sight)
    if sink_logits is not None:
        must_be("attention: learned logits", (sink_logits.numel(), sink_logits.is_contiguous()), (query_heads, True))
    wide = triton.next_power_of_2(dim)
    tile = shape(wide, query.dtype) if tile is None else tile
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    until = sight.until.int().contiguous()
    blocks, listed, table = triton.cdiv(tokens, tile.queries), 0, []
    own = sight.each or [HeadVisibility(sight.window, sight.far, sight.reach)] * heads
    for window, far, reach in own:
        most = max(1, min(n_keys, far))
        table.append([n_keys + 1 if window is None else min(window, n_keys + 1), reach, most, listed])
        listed += blocks * most
    lists = torch.empty(listed, dtype=torch.int32, device=query.device)
    counts = torch.empty(heads, blocks, dtype=torch.int32, device=query.device)
    of_heads = on_card(torch.tensor(table), query.device)
    where = (sight.first, sight.prefix_slots, sight.start, n_keys)
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(query):
        _list[(blocks, heads)](until, lists, counts, of_heads, *where, QUERIES=tile.queries, SOME=SCAN)
        _attend_block[(blocks, batch * query_heads)](
            query,
            keys,
            values,
            until,
            lists,
            counts,
            of_heads,
            lse if sink_logits is None else sink_logits,
            output,
            lse,
            *where,
            tokens,
            scaling,
            1.0 if softcap is None else softcap,
            GROUP=batch * query_heads // heads,
            QUERY_HEADS=query_heads,
            dim=dim,
            DIM=wide,
            QUERIES=tile.queries,
            KEYS=tile.keys,
            GAPS=sight.gaps,
            CAPPED=softcap is not None,
            LEARNED=sink_logits is not None,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return output, lse
