"""Append tokens to all heads of a layer in one kernel launch that does not involve the host, and hide columns.

For every head it does what cache/slots.py does: the token goes into its slot in the ring. The key that leaves the window moves
to a sink slot if it is a sink token, replaces the top-k key with the lowest score if its own is higher, or is evicted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headsink.attention.cuda.common import nearest, scale_of
from headsink.attention.cuda.decode import (
    FIELDS,
    KEYS,
    PAD,
    PREFIX_SLOTS,
    SCORES,
    SINK,
    START,
    TOP_K,
    VALUES,
    VISIBLE,
    WEIGHTS,
    WINDOW,
    check_table,
)
from headsink.attention.int8 import LARGEST as MOST
from headsink.attention.int8 import SCALE_BYTES as BYTES
from headsink.attention.kv_table import KVField
from headsink.errors import must_be

LARGEST, SCALE_BYTES = tl.constexpr(MOST), tl.constexpr(BYTES)
SCAN = 1024  # scores per block of the search for the lowest


@triton.jit
def _score(key_first, key_second, value, weights, column, pair, dim: tl.constexpr):
    """Return the linear importance score of a key (eviction/scorers). key_first, key_second: halves that form rotary pairs."""
    half: tl.constexpr = dim // 2
    of_first = tl.load(weights + pair, pair < half, other=0.0)
    of_second = tl.load(weights + half + pair, pair < half, other=0.0)
    of_pairs = tl.load(weights + dim + pair, pair < half, other=0.0)
    of_value = tl.load(weights + dim + half + column, column < dim, other=0.0)
    pairs = tl.sqrt(key_first * key_first + key_second * key_second)
    return tl.sum(key_first * of_first + key_second * of_second + pairs * of_pairs, 0) + tl.sum(value * of_value, 0)


@triton.jit
def _factor(numbers):
    """Return the factor by which numbers are multiplied before they are rounded to int8, and the scale that undoes it."""
    most = tl.max(tl.abs(numbers), 0)
    return tl.where(most > 0, LARGEST / tl.maximum(most, 1e-38), 0.0), most / LARGEST


@triton.jit
def _put(rows, slot, numbers, scale, column, width: tl.constexpr, dim: tl.constexpr, INT8: tl.constexpr):
    """Write a key or value to its slot."""
    tl.store(rows + slot * width + column, numbers, column < dim)
    if INT8:
        tl.store((rows + slot * width + dim).to(tl.pointer_type(tl.float32)), scale)


@triton.jit
def _enter(
    key,
    value,
    table,
    length_at,
    TOKENS: tl.constexpr,
    dim: tl.constexpr,
    DIM: tl.constexpr,
    SOME: tl.constexpr,
    INT8: tl.constexpr,
):
    kind = key.dtype.element_ty
    if INT8:
        kind = tl.int8
    half: tl.constexpr = dim // 2
    width: tl.constexpr = dim + SCALE_BYTES if INT8 else dim
    head, token = tl.program_id(0), tl.program_id(1)
    length = tl.load(length_at) + token
    own = table + head * FIELDS
    keys = tl.load(own + KEYS).to(tl.pointer_type(kind))
    values = tl.load(own + VALUES).to(tl.pointer_type(kind))
    visible = tl.load(own + VISIBLE).to(tl.pointer_type(tl.int8))
    sink, top_k, prefix_slots = tl.load(own + SINK), tl.load(own + TOP_K), tl.load(own + PREFIX_SLOTS)
    start, window, pad = tl.load(own + START), tl.load(own + WINDOW), tl.load(own + PAD)
    slot = prefix_slots + (length - start) % tl.maximum(window, 1)
    leaving = tl.where(length - start >= window, length - window - pad, -1)

    column, pair = tl.arange(0, DIM), tl.arange(0, DIM // 2)
    inside = column < dim
    key, value = key + (head * TOKENS + token) * dim, value + (head * TOKENS + token) * dim
    new_key, new_value = tl.load(key + column, inside, other=0.0), tl.load(value + column, inside, other=0.0)
    key_factor, key_scale = tl.cast(1.0, tl.float32), tl.cast(1.0, tl.float32)
    value_scale = key_scale
    if INT8:
        key_factor, key_scale = _factor(new_key.to(tl.float32))
        value_factor, value_scale = _factor(new_value.to(tl.float32))
        new_key = nearest(new_key.to(tl.float32) * key_factor).to(tl.int8)
        new_value = nearest(new_value.to(tl.float32) * value_factor).to(tl.int8)
    is_visible = tl.load(visible + slot, window > 0, other=1)  # hidden keys are not moved
    if (leaving >= 0) & (is_visible != 0):
        # without a window the new token leaves immediately
        old_key, old_value, old_key_scale, old_value_scale = new_key, new_value, key_scale, value_scale
        if window > 0:
            old_key = tl.load(keys + slot * width + column, inside, other=0)
            old_value = tl.load(values + slot * width + column, inside, other=0)
            if INT8:
                old_key_scale, old_value_scale = (
                    scale_of(keys + slot * width, dim),
                    scale_of(values + slot * width, dim),
                )
        target = leaving * 0 - 1
        if leaving < sink:
            target = leaving
        elif top_k > 0:
            scores = tl.load(own + SCORES).to(tl.pointer_type(tl.float32))
            weights = tl.load(own + WEIGHTS).to(tl.pointer_type(tl.float32))
            first = tl.load(key + pair, pair < half, other=0.0).to(tl.float32)
            second = tl.load(key + half + pair, pair < half, other=0.0).to(tl.float32)
            if INT8:
                first, second = nearest(first * key_factor), nearest(second * key_factor)
            if window > 0:
                first = tl.load(keys + slot * width + pair, pair < half, other=0).to(tl.float32)
                second = tl.load(keys + slot * width + half + pair, pair < half, other=0).to(tl.float32)
            first, second = first * old_key_scale, second * old_key_scale
            score = _score(first, second, old_value.to(tl.float32) * old_value_scale, weights, column, pair, dim)
            some = tl.arange(0, SOME)
            least = tl.full([SOME], float("inf"), tl.float32)
            at = tl.zeros([SOME], tl.int32)
            for begin in range(0, top_k.to(tl.int32), SOME):
                found = tl.load(scores + begin + some, begin + some < top_k, other=float("inf"))
                at = tl.where(found < least, begin + some, at)
                least = tl.minimum(least, found)
            lowest = tl.min(least, 0)
            if score > lowest:
                replaced = tl.min(tl.where(least == lowest, at, 2147483647), 0)
                tl.debug_barrier()
                tl.store(scores + replaced, score)
                target = sink + replaced
        tl.debug_barrier()  # all threads have read the leaving key before it is overwritten
        if target >= 0:
            _put(keys, target, old_key, old_key_scale, column, width, dim, INT8)
            _put(values, target, old_value, old_value_scale, column, width, dim, INT8)
            tl.store(visible + target, 1)
    if window > 0:
        _put(keys, slot, new_key, key_scale, column, width, dim, INT8)
        _put(values, slot, new_value, value_scale, column, width, dim, INT8)
        tl.store(visible + slot, (length >= pad).to(tl.int8))


def append_keys(key: Tensor, value: Tensor, table: Tensor, length: Tensor, int8: bool = False) -> None:
    """Append tokens to every sequence: one, or several if no head evicts.

    key, value: [sequences, KV heads, tokens, dim], contiguous; table: int64 [sequences, KV heads, len(KVField)]; length: int64
    [1], columns before them. int8: whether the buffers are (attention/int8.py).
    """
    sequences, heads, tokens, dim = key.shape
    check_table(table, length, sequences, heads, key.device)
    for given in (key, value):
        found = given.shape, given.dtype, given.device, given.is_contiguous()
        must_be("cache: new keys and values", found, (key.shape, key.dtype, key.device, True))
    wide = triton.next_power_of_2(dim)
    with torch.cuda.device_of(key):
        _enter[(sequences * heads, tokens)](
            key, value, table, length, TOKENS=tokens, dim=dim, DIM=wide, SOME=SCAN, INT8=int8, num_warps=4
        )


@triton.jit
def _hide(
    hidden, table, length_at, COLUMNS: tl.constexpr, HEADS: tl.constexpr, SEQUENCES: tl.constexpr, SOME: tl.constexpr
):
    head = tl.program_id(0)
    own = table + head.to(tl.int64) * FIELDS
    visible = tl.load(own + VISIBLE).to(tl.pointer_type(tl.int8))
    column = tl.arange(0, SOME)
    slot = tl.load(own + PREFIX_SLOTS) + tl.load(length_at) - COLUMNS + column - tl.load(own + START)
    sequence = head // HEADS % SEQUENCES
    hide_it = tl.load(hidden + sequence * COLUMNS + column, column < COLUMNS, other=0) != 0
    tl.store(visible + slot, 0, hide_it)


def hide(hidden: Tensor, tables: Tensor, length: Tensor) -> None:
    """Hide some of the last columns, bool [sequences, columns], in heads that do not evict.

    tables: int64 [layers, sequences, KV heads, len(KVField)]; length: int64 [1], all columns so far.
    """
    layers, sequences, heads, _ = tables.shape
    columns = hidden.shape[1]
    check_table(tables.view(layers * sequences, heads, len(KVField)), length, layers * sequences, heads, hidden.device)
    must_be("hide: rows", (len(hidden), hidden.dtype), (sequences, torch.bool))
    with torch.cuda.device_of(tables):
        _hide[(layers * sequences * heads,)](
            hidden.to(torch.int8).contiguous(),
            tables,
            length,
            COLUMNS=columns,
            HEADS=heads,
            SEQUENCES=sequences,
            SOME=triton.next_power_of_2(columns),
            num_warps=1,
        )
