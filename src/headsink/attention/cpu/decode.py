"""The compiled decode step on a CPU: one token of every sequence through all layers, and attention over heads of any length.

A decode step reads every weight and every cached key once, so memory bandwidth limits it if nothing else takes time. All layers
are one call, because torch and Python would add about 300 calls of ten microseconds. Weights, keys and values stay in torch's
memory and are accessed by address. They are float32, or bfloat16 (as uint16, since numba has no bfloat16); sums are float32.

Each head is a row in a table of addresses and numbers (attention/kv_table.py).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numba import carray, njit, prange

from headsink.attention.cpu.vectors import (
    FAST,
    add_weighted_sum,
    exp,
    narrow,
    pointer,
    products,
    products_in_order,
    wide,
)
from headsink.attention.kv_table import KVField


class Weight(IntEnum):
    """Index of each matrix of a layer, [out, in], in the table of addresses."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    OUTPUT = 3
    GATE = 4
    UP = 5
    DOWN = 6


BLOCK = 128  # keys per block, which fit into the L1 cache

# As numbers, because numba does not support enumerations as array indices.
_QUERY, _KEY, _VALUE, _OUTPUT, _GATE, _UP, _DOWN = (int(w) for w in Weight)
_KEYS, _VALUES, _VISIBLE, _SCORES, _WEIGHTS, _SINK, _TOP_K, *_, _END, _SLOT, _LEAVING = (int(f) for f in KVField)


@njit
def _share(size: Any, part: Any, parts: Any) -> Any:
    """Return the start and end of part `part` of `size` rows."""
    return size * part // parts, size * (part + 1) // parts


@njit(fastmath=FAST)
def _times(address: Any, like: Any, x: Any, out: Any, part: Any, parts: Any) -> None:
    """Compute part of the columns of out = x W^T.

    W: [out, in], at `address`; x: float32 [sequences, in]; out: [sequences, out].
    """
    sequences, columns = x.shape
    start, end = _share(out.shape[1], part, parts)
    if sequences > 1:
        at, to = address + start * columns * like.itemsize, out[:, start:].ctypes.data
        products_in_order(at, like, end - start, columns, x.ctypes.data, sequences, to, out.shape[1])
        return
    weight, vector = carray(pointer(address, like), (out.shape[1], columns)), x[0]
    for row in range(start, end):  # in the order of memory, which is fastest
        total = np.float32(0)
        for column in range(columns):
            total += wide(weight[row, column]) * vector[column]
        out[0, row] = total


@njit(fastmath=FAST)
def _add(x: Any, more: Any) -> None:
    for n in range(x.shape[0]):
        x[n] += more[n]


@njit(fastmath=FAST)
def _normalise(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """RMSNorm of float32 [n]."""
    total = np.float32(0)
    for n in range(x.shape[0]):
        total += x[n] * x[n]
    scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + eps)
    for n in range(x.shape[0]):
        out[n] = x[n] * scale * weight[n]


@njit(fastmath=FAST)
def _rotate(x: Any, cos: Any, sin: Any) -> None:
    """Rotary position, in place. x: float32 [dim or more]; cos, sin: [rotated]: only the first coordinates are rotated."""
    half = cos.shape[0] // 2
    for n in range(half):
        a, b = x[n], x[n + half]
        x[n] = a * cos[n] - b * sin[n]
        x[n + half] = b * cos[n + half] + a * sin[n + half]


@njit(fastmath=FAST)
def _score(key: Any, value: Any, weights: Any) -> Any:
    """Return the linear importance score of a key (eviction/scorers): float32. key, value: [dim]; weights: float32 [features]."""
    dim = key.shape[0]
    half, total = dim // 2, np.float32(0)
    for n in range(dim):
        total += wide(key[n]) * weights[n] + wide(value[n]) * weights[dim + half + n]
    for n in range(half):
        a, b = wide(key[n]), wide(key[half + n])
        total += np.sqrt(a * a + b * b) * weights[dim + n]
    return total


@njit(fastmath=FAST)
def _append(head: Any, key: Any, value: Any, like: Any) -> None:
    """Append a token to a head. Move or evict the key that leaves the window. key, value: float32 [dim]."""
    dim, sink, slot, leaving = key.shape[0], head[_SINK], head[_SLOT], head[_LEAVING]
    top_k = head[_TOP_K]
    slots = max(head[_END], sink + top_k, slot + 1)
    keys = carray(pointer(head[_KEYS], like), (slots, dim))
    values = carray(pointer(head[_VALUES], like), (slots, dim))
    visible = carray(pointer(head[_VISIBLE], np.empty(0, np.uint8)), slots)
    if leaving >= 0 and (slot < 0 or visible[slot]):
        if slot >= 0:
            old_key, old_value = keys[slot], values[slot]
        else:  # no window: the new token leaves immediately
            old_key, old_value = np.empty_like(keys[0]), np.empty_like(keys[0])
            for n in range(dim):
                old_key[n], old_value[n] = narrow(key[n], like), narrow(value[n], like)
        target = -1
        if leaving < sink:
            target = leaving
        elif top_k:
            scores = carray(pointer(head[_SCORES], np.empty(0, np.float32)), top_k)
            weights = carray(pointer(head[_WEIGHTS], np.empty(0, np.float32)), 2 * dim + dim // 2)
            score, least = _score(old_key, old_value, weights), 0
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
        for n in range(dim):
            keys[slot, n], values[slot, n] = narrow(key[n], like), narrow(value[n], like)
        visible[slot] = 1


@njit(fastmath=FAST)
def _attend(
    head: Any,
    like: Any,
    query: Any,
    rotated: Any,
    tokens: Any,
    logits: Any,
    top: Any,
    total: Any,
    out: Any,
    part: Any,
    parts: Any,
) -> None:
    """Attend from all queries of a KV head over part of its keys, block by block.

    query: float32 [group, dim], scaled. rotated: the queries for the sink tokens, or [0, dim]. tokens: adjacent queries per
    head of the group; the last slots are their keys, which earlier queries do not see. logits: scratch, float32 [group, BLOCK].
    Outputs: top, the largest logit, float32 [group]; total, the sum of e^(logit - top), float32 [group]; out, the values
    weighted by e^(logit - top), float32 [group, dim].
    """
    group, dim = query.shape
    size, row_bytes = head[_END], dim * like.itemsize
    start, end = _share(size, part, parts)
    keys = carray(pointer(head[_KEYS], like), (size, dim))
    visible = carray(pointer(head[_VISIBLE], np.empty(0, np.uint8)), size)
    for row in range(group):
        top[row], total[row] = -np.inf, 0
        for n in range(dim):
            out[row, n] = 0
    for first in range(start, end, BLOCK):
        count = min(BLOCK, end - first)
        products(head[_KEYS] + first * row_bytes, like, count, dim, query.ctypes.data, group, logits.ctypes.data, BLOCK)
        for slot in range(first, min(first + count, head[_SINK])):
            for row in range(rotated.shape[0]):
                one = np.float32(0)
                for n in range(dim):
                    one += wide(keys[slot, n]) * rotated[row, n]
                logits[row, slot - first] = one
        for slot in range(first, first + count):
            if not visible[slot]:
                for row in range(group):
                    logits[row, slot - first] = -np.inf
            for token in range(slot - size + tokens):
                for row in range(token, group, tokens):
                    logits[row, slot - first] = -np.inf
        for row in range(group):
            most = np.float32(-np.inf)
            for n in range(count):
                most = max(most, logits[row, n])
            if most > top[row]:
                if top[row] > -np.inf:
                    scale = exp(top[row] - most)
                    total[row] *= scale
                    for n in range(dim):
                        out[row, n] *= scale
                top[row] = most
            most, sum_ = top[row], np.float32(0)
            if most > -np.inf:
                for n in range(count):
                    share = exp(logits[row, n] - most)
                    logits[row, n] = share
                    sum_ += share
            else:
                for n in range(count):
                    logits[row, n] = 0
            total[row] += sum_
        add_weighted_sum(
            head[_VALUES] + first * row_bytes, like, count, dim, logits.ctypes.data, group, BLOCK, out.ctypes.data
        )


@njit(fastmath=FAST)
def _combine(top: Any, total: Any, out: Any, result: Any) -> None:
    """Combine the parts of the keys. top, total: float32 [parts]; out: [parts, dim]; result: [dim], 0 if no key is visible."""
    most, sum_ = np.max(top), np.float32(0)
    for n in range(result.shape[0]):
        result[n] = 0
    if most == -np.inf:
        return
    for part in range(top.shape[0]):
        if top[part] > -np.inf:
            share = exp(top[part] - most)
            sum_ += share * total[part]
            for n in range(result.shape[0]):
                result[n] += share * out[part, n]
    for n in range(result.shape[0]):
        result[n] /= sum_


@njit(fastmath=FAST, parallel=True, nogil=True, cache=True)
def attend(head_table: Any, like: Any, key: Any, value: Any, query: Any, tokens: Any, out: Any, threads: Any) -> None:
    """Attend from a few tokens over heads.

    head_table: int64 [heads, len(KVField)]. key, value: float32 [heads, dim] of a token to append before, or [0, dim].
    query: float32 [heads, group x tokens, dim], scaled. out: output of the same shape.
    """
    for head in range(key.shape[0]):
        _append(head_table[head], key[head], value[head], like)
    heads, group, dim = query.shape
    top, total = np.empty((heads, threads, group), np.float32), np.empty((heads, threads, group), np.float32)
    parts = np.empty((heads, threads, group, dim), np.float32)
    rotated = np.empty((0, dim), np.float32)
    for part in prange(threads):
        logits = np.empty((group, BLOCK), np.float32)
        for head in range(heads):
            sums = top[head, part], total[head, part], parts[head, part]
            _attend(head_table[head], like, query[head], rotated, tokens, logits, *sums, part, threads)
    for head in range(heads):
        for row in range(group):
            _combine(top[head, :, row], total[head, :, row], parts[head, :, row], out[head, row])


@njit(fastmath=FAST, parallel=True, nogil=True, cache=True)
def run(
    weights: Any,
    head_table: Any,
    norms: Any,
    head_norms: Any,
    biases: Any,
    last_norm: Any,
    unembedding: Any,
    x: Any,
    cos: Any,
    sin: Any,
    turns: Any,
    logits: Any,
    like: Any,
    inner: Any,
    group: Any,
    scaling: Any,
    eps: Any,
    threads: Any,
) -> None:
    """Run one token of every sequence through all layers.

    weights: addresses, int64 [layers, len(Weight)]; head_table: int64 [layers, sequences, KV heads, len(KVField)]. norms: float32
    [layers, 2, hidden], before attention and before the MLP. head_norms: float32 [layers, 2, dim] of queries and keys, or
    [layers, 0, dim]. biases: float32 [layers, (query heads + 2 KV heads) x dim], or [layers, 0]. last_norm: float32 [hidden];
    unembedding: address of [vocabulary, hidden]. x: float32 [sequences, hidden], the embeddings of the tokens, overwritten. cos,
    sin: float32 [sequences, rotated]. turns: float32 [2, layers, sequences, KV heads, rotated], cos and sin of the position from
    which a head attends to the sink tokens, or [2, layers, sequences, 0, 0]. logits: output, float32 [sequences, vocabulary].
    like: an empty array of the weights' dtype. inner: the width of the MLP. group: query heads per KV head.
    """
    layers, sequences, kv_heads, _ = head_table.shape
    hidden, dim = x.shape[1], head_norms.shape[2]
    query_heads, heads = kv_heads * group, sequences * kv_heads
    normed, added = np.empty((sequences, hidden), np.float32), np.empty((sequences, hidden), np.float32)
    query = np.empty((sequences, query_heads * dim), np.float32)
    key, value = np.empty((sequences, kv_heads * dim), np.float32), np.empty((sequences, kv_heads * dim), np.float32)
    top, total = np.empty((heads, threads, group), np.float32), np.empty((heads, threads, group), np.float32)
    parts = np.empty((heads, threads, group, dim), np.float32)
    attended = np.empty((heads, group, dim), np.float32)
    by_head, flat = query.reshape((heads, group, dim)), attended.reshape((sequences, query_heads * dim))
    keys, values = key.reshape((heads, dim)), value.reshape((heads, dim))
    rotated = np.empty((heads, group if turns.shape[3] else 0, dim), np.float32)
    gate, up = np.empty((sequences, inner), np.float32), np.empty((sequences, inner), np.float32)
    for layer in range(layers):
        own = weights[layer]
        for sequence in range(sequences):
            _normalise(x[sequence], norms[layer, 0], eps, normed[sequence])
        for part in prange(threads):
            _times(own[_QUERY], like, normed, query, part, threads)
            _times(own[_KEY], like, normed, key, part, threads)
            _times(own[_VALUE], like, normed, value, part, threads)
        if biases.shape[1]:
            first, second = query_heads * dim, (query_heads + kv_heads) * dim
            for sequence in range(sequences):
                _add(query[sequence], biases[layer, :first])
                _add(key[sequence], biases[layer, first:second])
                _add(value[sequence], biases[layer, second:])
        for part in prange(threads):
            for head in range(part, heads, threads):
                sequence, number = head // kv_heads, head % kv_heads
                if head_norms.shape[1]:
                    _normalise(keys[head], head_norms[layer, 1], eps, keys[head])
                _rotate(keys[head], cos[sequence], sin[sequence])
                for row in range(group):
                    vector = by_head[head, row]
                    if head_norms.shape[1]:
                        _normalise(vector, head_norms[layer, 0], eps, vector)
                    for n in range(dim):
                        vector[n] *= scaling
                    if rotated.shape[1]:
                        rotated[head, row] = vector
                        _rotate(
                            rotated[head, row], turns[0, layer, sequence, number], turns[1, layer, sequence, number]
                        )
                    _rotate(vector, cos[sequence], sin[sequence])
                _append(head_table[layer, sequence, number], keys[head], values[head], like)
        for part in prange(threads):
            scratch = np.empty((group, BLOCK), np.float32)
            for head in range(heads):
                sums = top[head, part], total[head, part], parts[head, part]
                table = head_table[layer, head // kv_heads, head % kv_heads]
                _attend(table, like, by_head[head], rotated[head], 1, scratch, *sums, part, threads)
        for head in range(heads):
            for row in range(group):
                _combine(top[head, :, row], total[head, :, row], parts[head, :, row], attended[head, row])
        for part in prange(threads):
            _times(own[_OUTPUT], like, flat, added, part, threads)
        for sequence in range(sequences):
            _add(x[sequence], added[sequence])
        for sequence in range(sequences):
            _normalise(x[sequence], norms[layer, 1], eps, normed[sequence])
        for part in prange(threads):
            _times(own[_GATE], like, normed, gate, part, threads)
            _times(own[_UP], like, normed, up, part, threads)
            start, end = _share(inner, part, threads)
            for sequence in range(sequences):
                for n in range(start, end):
                    up[sequence, n] *= gate[sequence, n] / (np.float32(1) + exp(-gate[sequence, n]))
        for part in prange(threads):
            _times(own[_DOWN], like, up, added, part, threads)
        for sequence in range(sequences):
            _add(x[sequence], added[sequence])
    for sequence in range(sequences):
        _normalise(x[sequence], last_norm, eps, normed[sequence])
    for part in prange(threads):
        _times(unembedding, like, normed, logits, part, threads)
