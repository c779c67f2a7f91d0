"""Decode attention on a GPU: one token, or the last few, over the cached keys of every head of a layer.

One launch serves all sequences and KV heads of a layer, whatever the number of keys of each. The tiles of keys of all heads
form one list that is divided equally among the programs, across head boundaries (LeanAttention, arXiv 2405.10480). So heads
with 131,072 and with 128 keys are balanced. The queries of a group are rows of one product, so each key and value is read once.
A second, small launch combines the partial results of each head (FlashDecoding).

A table on the GPU (attention/kv_table.py) has the addresses of the heads. Only the number of columns changes from token to
token, and the kernel reads it from GPU memory. So a CUDA graph can capture the launch and replay it for every token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headsink.attention.cuda.common import LOG2E, cap, processors, product
from headsink.attention.int8 import SCALE_BYTES as BYTES
from headsink.attention.kv_table import KVField, check_buffers
from headsink.errors import must_be

SCALE_BYTES = tl.constexpr(BYTES)
TILE_BYTES = 2**14  # of the keys in a tile; the same for the values
FIELDS = tl.constexpr(len(KVField))
KEYS, VALUES, VISIBLE, SCORES, WEIGHTS, SINK, TOP_K, PREFIX_SLOTS, START, WINDOW, PAD = (
    tl.constexpr(int(field)) for field in list(KVField)[: KVField.END]
)


@triton.jit
def _spans(table, length, heads: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr):
    """Return the first slot to read, the end of the used slots, and the number of tiles of every head after `length` columns.

    int32 [HEADS], 0 after the last head. Left padding of a head that does not evict is skipped.
    """
    head = tl.arange(0, HEADS)
    real = head < heads
    own = table + head * FIELDS
    prefix_slots, start = tl.load(own + PREFIX_SLOTS, real, other=0), tl.load(own + START, real, other=0)
    window, pad = tl.load(own + WINDOW, real, other=0), tl.load(own + PAD, real, other=0)
    ends = tl.where(real, prefix_slots + tl.minimum(length - start, window), 0).to(tl.int32)
    unseen = tl.where((window >= length) & (prefix_slots == 0), tl.maximum(pad - start, 0), 0).to(tl.int32)
    firsts = tl.minimum(unseen, ends) // TILE * TILE
    return firsts, ends, tl.cdiv(ends - firsts, TILE)


@triton.jit
def _part(total, program, programs):
    """Return the first tile of a program's part."""
    return (total.to(tl.int64) * program // programs).to(tl.int32)


@triton.jit
def _of(values, index, n):
    """Return values[n]."""
    return tl.sum(tl.where(index == n, values, 0))


@triton.jit
def _attend_part(
    query,
    rotated,
    table,
    length_at,
    found,
    tops,
    totals,
    scaling,
    softcap,
    heads: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    dim: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CAPPED: tl.constexpr,
    ROTATED: tl.constexpr,
    STAGES: tl.constexpr,
    INT8: tl.constexpr,
):
    kind = query.dtype.element_ty
    cached = kind
    if INT8:
        cached = tl.int8
    width: tl.constexpr = dim + SCALE_BYTES if INT8 else dim
    program = tl.program_id(0)
    length = tl.load(length_at) + TOKENS
    head_index = tl.arange(0, HEADS)
    firsts, ends, tiles = _spans(table, length, heads, HEADS, TILE)
    until = tl.cumsum(tiles)
    total = tl.sum(tiles)
    programs = tl.minimum(total, PROGRAMS)  # every program has at least one tile
    tile, last = 0, 0
    if program < programs:
        tile, last = _part(total, program, programs), _part(total, program + 1, programs)

    unit = scaling * LOG2E  # scales logits in the exponent of 2, unless they are capped
    if CAPPED:
        unit = tl.cast(LOG2E, tl.float32)
    row, column, slot = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    rows: tl.constexpr = GROUP * TOKENS
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    while tile < last:
        head = tl.sum((until <= tile).to(tl.int32))
        end, begun = _of(ends, head_index, head), _of(until - tiles - firsts // TILE, head_index, head)
        stop = tl.minimum(last, _of(until, head_index, head))
        own = table + head * FIELDS
        keys = tl.load(own + KEYS).to(tl.pointer_type(cached))
        values = tl.load(own + VALUES).to(tl.pointer_type(cached))
        if not INT8:
            keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
        visible = tl.load(own + VISIBLE).to(tl.pointer_type(tl.int8))
        theirs = (head * rows + row)[:, None] * dim + column[None, :]
        queries = tl.load(query + theirs, inside, other=0.0)
        if ROTATED:
            sink, sink_queries = tl.load(own + SINK), tl.load(rotated + theirs, inside, other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        sum_ = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, DIM], tl.float32)
        for first in tl.range((tile - begun) * TILE, (stop - begun) * TILE, TILE, num_stages=STAGES):
            slots = first + slot
            in_use = slots < end
            valid = in_use[:, None] & (column < dim)[None, :]
            offset = slots[:, None] * width + column[None, :]
            key = tl.load(keys + offset, valid, other=0)
            value = tl.load(values + offset, valid, other=0)
            if INT8:
                key, value = key.to(tl.float32).to(kind), value.to(tl.float32).to(kind)
            seen = (tl.load(visible + slots, in_use, other=0) != 0)[None, :]
            if TOKENS > 1:  # the last tokens are in the last slots
                seen = seen & (slots[None, :] <= (end - TOKENS + row % TOKENS)[:, None])
            logits = product(queries, tl.trans(key), tl.zeros([ROWS, TILE], tl.float32))
            if ROTATED:
                of_first = product(sink_queries, tl.trans(key), tl.zeros([ROWS, TILE], tl.float32))
                logits = tl.where((slots < sink)[None, :], of_first, logits)
            if INT8:
                row_at = slots * width + dim
                key_scale = tl.load((keys + row_at).to(tl.pointer_type(tl.float32)), in_use, other=0.0)
                value_scale = tl.load((values + row_at).to(tl.pointer_type(tl.float32)), in_use, other=0.0)
                logits = logits * key_scale[None, :]
            if CAPPED:
                logits = cap(logits * scaling, softcap)
            logits = tl.where(seen, logits, float("-inf"))
            most = tl.maximum(top, tl.max(logits, 1))
            finite = tl.where(most == float("-inf"), 0.0, most)  # no key is visible yet: avoid inf - inf
            shares = tl.exp2(logits * unit - (finite * unit)[:, None])
            factor = tl.exp2((top - finite) * unit)
            sum_ = sum_ * factor + tl.sum(shares, 1)
            if INT8:
                shares = shares * value_scale[None, :]
            out = product(shares.to(kind), value, out * factor[:, None])
            top = most
        part = (
            program + head
        ) * rows + row  # program + head is unique for every pair of a program and a head in its part
        tl.store(tops + part, top * unit, row < rows)
        tl.store(totals + part, sum_, row < rows)
        tl.store(found + part[:, None] * dim + column[None, :], out, inside)
        tile = stop


@triton.jit
def _combine(
    found,
    tops,
    totals,
    table,
    length_at,
    sink_logits,
    output,
    lse,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    dim: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,
    SOME: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEARNED: tl.constexpr,
):
    """Combine the parts of a head: each program handles one row and `COLUMNS` of its coordinates."""
    rows: tl.constexpr = GROUP * TOKENS
    head, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head_index = tl.arange(0, HEADS)
    _, _, tiles = _spans(table, tl.load(length_at) + TOKENS, heads, HEADS, TILE)
    until, total = tl.cumsum(tiles), tl.sum(tiles).to(tl.int64)
    own, ended = _of(tiles, head_index, head), _of(until, head_index, head).to(tl.int64)
    # Program p begins at tile `total p // programs`. `first` is the last program that begins at or before this head's first tile.
    programs = tl.maximum(tl.minimum(total, PROGRAMS), 1)
    first = ((ended - own + 1) * programs - 1) // tl.maximum(total, 1)
    parts = tl.where(own > 0, (ended * programs - 1) // tl.maximum(total, 1) - first + 1, 0).to(tl.int32)
    at = (first.to(tl.int32) + head) * rows + row

    every = tl.arange(0, PARTS)
    theirs = tl.load(tops + at + every * rows, every < parts, other=float("-inf"))
    most = tl.max(theirs, 0)
    finite = tl.where(most == float("-inf"), 0.0, most)
    sum_ = tl.sum(tl.load(totals + at + every * rows, every < parts, other=0.0) * tl.exp2(theirs - finite), 0)
    out = tl.zeros([COLUMNS], tl.float32)
    some = tl.arange(0, SOME)
    for start in range(0, parts, SOME):
        part = start + some
        valid = part < parts
        weight = tl.exp2(tl.load(tops + at + part * rows, valid, other=float("-inf")) - finite)
        offset = (at + part * rows)[:, None] * dim + column[None, :]
        vectors = tl.load(found + offset, valid[:, None] & (column < dim)[None, :], other=0.0)
        out += tl.sum(vectors * weight[:, None], 0)
    logarithm = finite + tl.log2(sum_)  # -inf if no key is visible
    divisor = sum_
    if LEARNED:
        extra = tl.load(sink_logits + (head % kv_heads) * GROUP + row // TOKENS).to(tl.float32) * LOG2E
        divisor += tl.exp2(extra - finite)
    divisor = tl.where(sum_ == 0.0, 1.0, divisor)
    row_at = head * rows + row
    tl.store(output + row_at * dim + column, (out / divisor).to(output.dtype.element_ty), column < dim)
    if tl.program_id(1) == 0:
        tl.store(lse + row_at, logarithm / LOG2E)


def check_table(table: Tensor, length: Tensor, sequences: int, heads: int, device: torch.device) -> None:
    """Raise unless a table has the right shape, dtype and device.

    cache/kv_table.py checks the buffers when it creates the table, and cache/layer.py checks new keys.
    """
    found = tuple(table.shape), table.dtype, table.device, table.is_contiguous()
    must_be("attention: the table of KV heads", found, ((sequences, heads, len(KVField)), torch.int64, device, True))
    must_be("attention: the length", (length.numel(), length.dtype, length.device), (1, torch.int64, device))


def attend(
    query: Tensor,
    table: Tensor,
    length: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    rotated: Tensor | None = None,
    programs: int | None = None,
    int8: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend from the last tokens of every sequence over the cached keys of each head, their own included.

    query: [sequences, KV heads x group, tokens, dim], contiguous; table: int64 [sequences, KV heads, len(KVField)]; length: int64
    [1], columns before those of the queries. With more than one token, no ring may have wrapped. softcap: logits become softcap x
    tanh(logits / softcap). sink_logits: [KV heads x group], logits in the softmax without a value. rotated: the queries for the
    sink tokens, for cache-relative positions (models/rope.py). programs: number of programs, by default twice the number of
    multiprocessors. int8: whether the buffers are (attention/int8.py). Returns the output in the query's dtype, zero where no key
    is visible, and the log-sum-exp of the keys' logits, float32 [sequences, KV heads x group, tokens], -inf where no key is
    visible.
    """
    sequences, query_heads, tokens, dim = query.shape
    kv_heads = table.shape[1]
    check_table(table, length, sequences, kv_heads, query.device)
    must_be("attention: query heads left over", query_heads % kv_heads, 0)
    for given in (query, *(() if rotated is None else (rotated,))):
        kind = given.shape, given.dtype, given.device, given.is_contiguous()
        must_be("attention: queries", kind, (query.shape, query.dtype, query.device, True))
    if sink_logits is not None:
        must_be("attention: learned logits", (sink_logits.numel(), sink_logits.is_contiguous()), (query_heads, True))
    heads, group = sequences * kv_heads, query_heads // kv_heads
    rows = group * tokens
    programs = 2 * processors(query.device) if programs is None else programs
    found = query.new_empty(programs + heads, rows, dim, dtype=torch.float32)  # the parts of all programs
    tops, totals = query.new_empty(2, programs + heads, rows, dtype=torch.float32)
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    wide = triton.next_power_of_2(dim)
    same: dict[str, Any] = {
        "heads": heads,
        "GROUP": group,
        "TOKENS": tokens,
        "dim": dim,
        "HEADS": triton.next_power_of_2(heads),
        "TILE": min(128, TILE_BYTES // (wide * query.element_size())),
        "PROGRAMS": programs,
    }
    columns = min(32, wide)
    with torch.cuda.device_of(query):
        _attend_part[(programs,)](
            query,
            query if rotated is None else rotated,
            table,
            length,
            found,
            tops,
            totals,
            scaling,
            1.0 if softcap is None else softcap,
            ROWS=max(16, triton.next_power_of_2(rows)),
            DIM=wide,
            CAPPED=softcap is not None,
            ROTATED=rotated is not None,
            STAGES=3,
            INT8=int8,
            num_warps=4,
            **same,
        )
        _combine[(heads * rows, triton.cdiv(dim, columns))](
            found,
            tops,
            totals,
            table,
            length,
            tops if sink_logits is None else sink_logits,
            output,
            lse,
            kv_heads=kv_heads,
            PARTS=triton.next_power_of_2(programs),
            SOME=min(64, triton.next_power_of_2(programs)),
            COLUMNS=columns,
            LEARNED=sink_logits is not None,
            num_warps=4,
            **same,
        )
    return output, lse


def attend_buffers(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    end: int,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Call `attend` for heads that all have `end` keys, in buffers of one shape.

    keys, values: [sequences, KV heads, slots, dim], or int8 (attention/int8.py); visible: bool [sequences, KV heads, slots].
    """
    sequences, kv_heads, slots, width = keys.shape
    check_buffers(query, keys, values, visible, end)
    keys, values, visible = keys.contiguous(), values.contiguous(), visible.contiguous()
    number = torch.arange(sequences * kv_heads, device=query.device).view(sequences, kv_heads) * slots
    table = number.new_zeros(sequences, kv_heads, len(KVField))
    for field, buffer, size in ((KEYS, keys, width), (VALUES, values, width), (VISIBLE, visible, 1)):
        table[..., field.value] = number * (size * buffer.element_size()) + buffer.data_ptr()
    table[..., KVField.WINDOW] = end
    length = torch.full((1,), end - query.shape[2], device=query.device)
    return attend(query, table, length, scaling, softcap, sink_logits, programs=programs, int8=keys.dtype == torch.int8)
