"""Attention of a few tokens on a CPU, over heads of any length, without copying their keys.

Keys and values stay in torch's memory and are accessed by address. They are float32, bfloat16 (as uint16, since numba has no
bfloat16), or rows of attention/formats.py; sums are float32. Values in 4 bits are unpacked a block at a time. Each head is a row
in a table of addresses and numbers (attention/kv_table.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, prange

from headsink.attention.cpu.elements import (
    FAST,
    FLOATS,
    bits,
    encode,
    exp,
    pointer,
    row_bytes,
    scale_columns,
    scale_of,
    unpack,
    wide,
)
from headsink.attention.cpu.memory import fetch
from headsink.attention.cpu.vectors import add_weighted_sum, largest, products
from headsink.attention.kv_table import KVField

BLOCK = 128  # keys per block, which fit into the L1 cache

# As numbers, because numba does not support enumerations as array indices.
_KEYS, _VALUES, _VISIBLE, _SCORES, _WEIGHTS, _SINK, _TOP_K, *_, _END, _SLOT, _LEAVING = (int(f) for f in KVField)


@njit
def share(size: Any, part: Any, parts: Any) -> Any:
    """Return the start and end of part `part` of `size` rows."""
    return size * part // parts, size * (part + 1) // parts


@njit(fastmath=FAST)
def cap(x: Any, most: Any) -> Any:
    """Return most x tanh(x / most)."""
    return most - np.float32(2) * most / (exp(np.float32(2) * x / most) + np.float32(1))


@njit(fastmath=FAST)
def _score(key: Any, value: Any, weights: Any, dim: Any, key_like: Any, value_like: Any) -> Any:
    """Return the linear importance score of a key (eviction/scorers): float32.

    key, value: rows with `dim` coordinates; weights: float32 [features].
    """
    half, of_key, of_value = dim // 2, np.float32(0), np.float32(0)
    for n in range(dim):
        of_key += wide(key[n]) * weights[n]
    for n in range(half):
        a, b = wide(key[n]), wide(key[half + n])
        of_key += np.sqrt(a * a + b * b) * weights[dim + n]
    if bits(value_like) == 4:
        numbers = np.empty(dim, np.float32)
        unpack(value.ctypes.data, dim, numbers)
        for n in range(dim):
            of_value += numbers[n] * weights[dim + half + n]
    else:
        for n in range(dim):
            of_value += wide(value[n]) * weights[dim + half + n]
    return of_key * scale_of(key.ctypes.data, key_like, dim) + of_value * scale_of(value.ctypes.data, value_like, dim)


@njit(fastmath=FAST)
def append(head: Any, key: Any, value: Any, key_like: Any, value_like: Any) -> None:
    """Append a token to a head. Move or evict the key that leaves the window. key, value: float32 [dim]."""
    dim, sink, slot, leaving = key.shape[0], head[_SINK], head[_SLOT], head[_LEAVING]
    top_k = head[_TOP_K]
    slots = max(head[_END], sink + top_k, slot + 1)
    key_width, value_width = row_bytes(dim, key_like), row_bytes(dim, value_like)
    keys = carray(pointer(head[_KEYS], key_like), (slots, key_width // key_like.itemsize))
    values = carray(pointer(head[_VALUES], value_like), (slots, value_width // value_like.itemsize))
    visible = carray(pointer(head[_VISIBLE], np.empty(0, np.uint8)), slots)
    if leaving >= 0 and (slot < 0 or visible[slot]):
        if slot >= 0:
            old_key, old_value = keys[slot], values[slot]
        else:  # no window: the new token leaves immediately
            old_key, old_value = np.empty_like(keys[0]), np.empty_like(values[0])
            encode(key, key_like, old_key)
            encode(value, value_like, old_value)
        target = -1
        if leaving < sink:
            target = leaving
        elif top_k:
            scores = carray(pointer(head[_SCORES], FLOATS), top_k)
            weights = carray(pointer(head[_WEIGHTS], FLOATS), 2 * dim + dim // 2)
            score, least = _score(old_key, old_value, weights, dim, key_like, value_like), 0
            for n in range(top_k):
                if scores[n] < scores[least]:
                    least = n
            if score > scores[least]:
                scores[least] = score
                target = sink + least
        if target >= 0:
            keys[target], values[target] = old_key, old_value
            visible[target] = 1
    if slot >= 0:
        encode(key, key_like, keys[slot])
        encode(value, value_like, values[slot])
        visible[slot] = 1


@njit(fastmath=FAST)
def attend_part(
    head: Any,
    key_like: Any,
    value_like: Any,
    query: Any,
    rotated: Any,
    tokens: Any,
    softcap: Any,
    logits: Any,
    top: Any,
    total: Any,
    out: Any,
    part: Any,
    parts: Any,
) -> None:
    """Attend from all queries of a KV head over part of its keys: one block of every `parts`.

    Blocks begin at multiples of BLOCK, and hidden keys add nothing, so outputs for a query do not depend on the keys after it.

    query: float32 [group, dim], scaled. rotated: the queries for the sink tokens, or [0, dim]. tokens: adjacent queries per
    head of the group; the last slots are their keys, which earlier queries do not see. softcap: logits become
    softcap x tanh(logits / softcap), 0 if they are not capped. logits: scratch, float32 [group + 1, BLOCK].
    Outputs: top, the largest logit, float32 [group]; total, the sum of e^(logit - top), float32 [group]; out, the values
    weighted by e^(logit - top), float32 [group, dim].
    """
    group, dim = query.shape
    size, width, value_width = head[_END], row_bytes(dim, key_like), row_bytes(dim, value_like)
    keys = carray(pointer(head[_KEYS], key_like), (size, width // key_like.itemsize))
    unpacked = np.empty((BLOCK if bits(value_like) == 4 else 0, dim), np.float32)
    visible = carray(pointer(head[_VISIBLE], np.empty(0, np.uint8)), size)
    for row in range(group):
        top[row], total[row] = -np.inf, 0
        for n in range(dim):
            out[row, n] = 0
    for first in range(part * BLOCK, size, parts * BLOCK):
        count = min(BLOCK, size - first)
        fetch(head[_VALUES] + first * value_width, count * value_width)
        fetch(head[_KEYS] + (first + parts * BLOCK) * width, count * width)
        products(head[_KEYS] + first * width, key_like, count, dim, query.ctypes.data, group, logits.ctypes.data, BLOCK)
        for slot in range(first, min(first + count, head[_SINK])):
            for row in range(rotated.shape[0]):
                one = np.float32(0)
                for n in range(dim):
                    one += wide(keys[slot, n]) * rotated[row, n]
                logits[row, slot - first] = one
        scale_columns(head[_KEYS] + first * width, key_like, count, dim, logits)
        if softcap:
            for row in range(group):
                for n in range(BLOCK):  # of which a compiler makes the same code for every number of keys
                    logits[row, n] = cap(logits[row, n], softcap)
        for row in range(group):
            for n in range(count, BLOCK):
                logits[row, n] = -np.inf
        seen = np.int32(0)
        for slot in range(first, first + count):
            seen += np.int32(visible[slot])
        if seen < count:
            for slot in range(first, first + count):
                if not visible[slot]:
                    for row in range(group):
                        logits[row, slot - first] = -np.inf
        for slot in range(max(first, size - tokens + 1), first + count):
            for token in range(slot - size + tokens):
                for row in range(token, group, tokens):
                    logits[row, slot - first] = -np.inf
        for row in range(group):
            most = largest(logits.ctypes.data + row * BLOCK * 4, BLOCK)
            if most > top[row]:
                if top[row] > -np.inf:
                    scale = exp(top[row] - most)
                    total[row] *= scale
                    for n in range(dim):
                        out[row, n] *= scale
                top[row] = most
            most, sum_ = top[row], np.float32(0)
            if most > -np.inf:
                for n in range(BLOCK):
                    weight = exp(logits[row, n] - most)
                    weight = weight if logits[row, n] > -np.inf else np.float32(0)
                    logits[row, n] = weight
                    sum_ += weight
            else:
                for n in range(BLOCK):
                    logits[row, n] = 0
            total[row] += sum_
        rows = head[_VALUES] + first * value_width
        if bits(value_like) == 4:
            for n in range(count):
                unpack(rows + n * value_width, dim, unpacked[n])
            add_weighted_sum(
                unpacked.ctypes.data, FLOATS, count, dim, logits.ctypes.data, group, BLOCK, out.ctypes.data
            )
        else:
            scale_columns(rows, value_like, count, dim, logits)
            add_weighted_sum(rows, value_like, count, dim, logits.ctypes.data, group, BLOCK, out.ctypes.data)


@njit(fastmath=FAST)
def combine(top: Any, total: Any, out: Any, sink: Any, result: Any) -> None:
    """Combine the parts of the keys.

    top, total: float32 [parts]; out: [parts, dim]. sink: a logit without a value, -inf for none. result: [dim], 0 if no key is
    visible.
    """
    most = max(np.max(top), sink)
    for n in range(result.shape[0]):
        result[n] = 0
    if most == -np.inf:
        return
    sum_ = exp(sink - most) if sink > -np.inf else np.float32(0)
    for part in range(top.shape[0]):
        if top[part] > -np.inf:
            weight = exp(top[part] - most)
            sum_ += weight * total[part]
            for n in range(result.shape[0]):
                result[n] += weight * out[part, n]
    for n in range(result.shape[0]):
        result[n] /= sum_


@njit(fastmath=FAST, parallel=True, nogil=True, cache=True)
def attend(
    head_table: Any,
    key_like: Any,
    value_like: Any,
    key: Any,
    value: Any,
    query: Any,
    tokens: Any,
    out: Any,
    threads: Any,
) -> None:
    """Attend from a few tokens over heads.

    head_table: int64 [heads, len(KVField)]. key, value: float32 [heads, dim] of a token to append before, or [0, dim].
    query: float32 [heads, group x tokens, dim], scaled. out: output of the same shape.
    """
    for head in range(key.shape[0]):
        append(head_table[head], key[head], value[head], key_like, value_like)
    heads, group, dim = query.shape
    top, total = np.empty((heads, threads, group), np.float32), np.empty((heads, threads, group), np.float32)
    parts = np.empty((heads, threads, group, dim), np.float32)
    rotated, none, nothing = np.empty((0, dim), np.float32), np.float32(0), np.float32(-np.inf)
    for part in prange(threads):
        logits = np.empty((group + 1, BLOCK), np.float32)
        for head in range(heads):
            sums = top[head, part], total[head, part], parts[head, part]
            own = (part + head) % threads  # heads begin in turn with another thread
            likes, given = (key_like, value_like), (query[head], rotated)
            attend_part(head_table[head], *likes, *given, tokens, none, logits, *sums, own, threads)
    for head in range(heads):
        for row in range(group):
            combine(top[head, :, row], total[head, :, row], parts[head, :, row], nothing, out[head, row])
