"""One token of every text through a decoder on a CPU, compiled: weights times vectors, and attention over heads of any length.

A decode step reads every weight and every kept key once, so it is as fast as memory is if nothing else takes time. All layers
are one call: torch and Python would add some 300 calls of ten microseconds. Weights, keys and values stay where torch has them
and are reached by their addresses; they are float32, or bfloat16 (held as uint16, which is what numba knows), sums are float32.

Heads have a row each in a table of addresses and numbers (layout.py).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numba import carray, njit, prange

from headsink.attention.cpu.vectors import FAST, add_weighted, exp, narrow, pointer, products, products_in_order, wide
from headsink.attention.kv_table import KVField


class Weight(IntEnum):
    """Matrices of a layer, [out, in], in the table of their addresses."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    OUTPUT = 3
    GATE = 4
    UP = 5
    DOWN = 6


BLOCK = 128  # keys at once, which stay in the processor's first cache

# The numbers, for the compiler, which takes no enumerations inside arrays' indices.
_QUERY, _KEY, _VALUE, _OUTPUT, _GATE, _UP, _DOWN = (int(w) for w in Weight)
_KEYS, _VALUES, _VISIBLE, _SCORES, _WEIGHTS, _SINK, _FLOATING, *_, _END, _SLOT, _LEAVING = (int(f) for f in KVField)


@njit
def _share(size: Any, part: Any, parts: Any) -> Any:
    """Start and end of a part of `size` rows."""
    return size * part // parts, size * (part + 1) // parts


@njit(fastmath=FAST)
def _times(address: Any, like: Any, x: Any, out: Any, part: Any, parts: Any) -> None:
    """A part of the rows of W of out = x W^T. W: at `address`, [out, in]; x: float32 [texts, in], out: [texts, out]."""
    texts, columns = x.shape
    start, end = _share(out.shape[1], part, parts)
    if texts > 1:
        at, to = address + start * columns * like.itemsize, out[:, start:].ctypes.data
        products_in_order(at, like, end - start, columns, x.ctypes.data, texts, to, out.shape[1])
        return
    weight, vector = carray(pointer(address, like), (out.shape[1], columns)), x[0]
    for row in range(start, end):  # one after the other, as memory is read fastest
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
    """Rotary position, in place. x: float32 [dim or more]; cos, sin: [rotated]: the first coordinates are turned."""
    half = cos.shape[0] // 2
    for n in range(half):
        a, b = x[n], x[n + half]
        x[n] = a * cos[n] - b * sin[n]
        x[n + half] = b * cos[n + half] + a * sin[n + half]


@njit(fastmath=FAST)
def _score(key: Any, value: Any, weights: Any) -> Any:
    """The score of a key (scores.py): float32. key, value: [dim] as they are held; weights: float32 [features]."""
    dim = key.shape[0]
    half, total = dim // 2, np.float32(0)
    for n in range(dim):
        total += wide(key[n]) * weights[n] + wide(value[n]) * weights[dim + half + n]
    for n in range(half):
        a, b = wide(key[n]), wide(key[half + n])
        total += np.sqrt(a * a + b * b) * weights[dim + n]
    return total


@njit(fastmath=FAST)
def _enter(head: Any, key: Any, value: Any, like: Any) -> None:
    """Let a token into a head, and move the one that leaves the window for it. key, value: float32 [dim]."""
    dim, sink, slot, leaving = key.shape[0], head[_SINK], head[_SLOT], head[_LEAVING]
    top_k = head[_FLOATING]
    slots = max(head[_END], sink + top_k, slot + 1)
    keys = carray(pointer(head[_KEYS], like), (slots, dim))
    values = carray(pointer(head[_VALUES], like), (slots, dim))
    visible = carray(pointer(head[_VISIBLE], np.empty(0, np.uint8)), slots)
    if leaving >= 0 and (slot < 0 or visible[slot]):
        if slot >= 0:
            old_key, old_value = keys[slot], values[slot]
        else:  # there is no window: it leaves at once
            old_key, old_value = np.empty_like(keys[0]), np.empty_like(keys[0])
            for n in range(dim):
                old_key[n], old_value[n] = narrow(key[n], like), narrow(value[n], like)
        target = -1
        if leaving < sink:
            target = leaving
        elif top_k:
            scores = carray(pointer(head[_SCORES], np.empty(0, np.float32)), top_k)
            weights = carray(pointer(head[_WEIGHTS], np.empty(0, np.float32)), 2 * dim + dim // 2)
            worth, least = _score(old_key, old_value, weights), 0
            for n in range(top_k):
                if scores[n] < scores[least]:
                    least = n
            if worth > scores[least]:
                scores[least] = worth
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
    """A part of the keys of a KV head, for all of its queries, a block of keys after the other.

    query: float32 [group, dim], scaled. turned: the same as they look at the first tokens, or [0, dim]. tokens: that a head of
    the group has queries of, side by side; the last slots are theirs, and hidden from those before. logits: scratch, float32
    [group, BLOCK]. Written: top, the largest logit, total, the sum of e^(logit - top), float32 [group]; out, the sum of values
    with these weights, float32 [group, dim].
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
        add_weighted(
            head[_VALUES] + first * row_bytes, like, count, dim, logits.ctypes.data, group, BLOCK, out.ctypes.data
        )


@njit(fastmath=FAST)
def _combine(top: Any, total: Any, out: Any, result: Any) -> None:
    """Parts of the keys put together. top, total: float32 [parts]; out: [parts, dim]; result: [dim], 0 if no key was seen."""
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
    """Attention of a few tokens over heads.

    head_table: int64 [heads, len(Field)]. key, value: float32 [heads, dim] of one token that comes in before, or [0, dim].
    query: float32 [heads, group x tokens, dim], scaled. out: the same shape, written.
    """
    for head in range(key.shape[0]):
        _enter(head_table[head], key[head], value[head], like)
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
    """One token of every text through all layers.

    weights: int64 [layers, len(Weight)] addresses; head_table: int64 [layers, texts, KV heads, len(Field)]. norms: float32
    [layers, 2, hidden], before attention and before the MLP. head_norms: float32 [layers, 2, dim] of queries and keys, or
    [layers, 0, dim]. biases: float32 [layers, (query heads + 2 KV heads) x dim], or [layers, 0]. last_norm: float32 [hidden];
    unembedding: address of [vocabulary, hidden]. x: float32 [texts, hidden], the tokens' embeddings, overwritten. cos, sin:
    float32 [texts, rotated]. turns: float32 [2, layers, texts, KV heads, rotated], cos and sin of the place from which a head
    looks at the first tokens, or [2, layers, texts, 0, 0]. logits: float32 [texts, vocabulary], written. like: an empty array of
    the weights' dtype. inner: the MLP's width. group: query heads of a KV head.
    """
    layers, texts, kv_heads, _ = head_table.shape
    hidden, dim = x.shape[1], head_norms.shape[2]
    query_heads, heads = kv_heads * group, texts * kv_heads
    normed, added = np.empty((texts, hidden), np.float32), np.empty((texts, hidden), np.float32)
    query = np.empty((texts, query_heads * dim), np.float32)
    key, value = np.empty((texts, kv_heads * dim), np.float32), np.empty((texts, kv_heads * dim), np.float32)
    top, total = np.empty((heads, threads, group), np.float32), np.empty((heads, threads, group), np.float32)
    parts = np.empty((heads, threads, group, dim), np.float32)
    attended = np.empty((heads, group, dim), np.float32)
    by_head, flat = query.reshape((heads, group, dim)), attended.reshape((texts, query_heads * dim))
    keys, values = key.reshape((heads, dim)), value.reshape((heads, dim))
    rotated = np.empty((heads, group if turns.shape[3] else 0, dim), np.float32)
    gate, up = np.empty((texts, inner), np.float32), np.empty((texts, inner), np.float32)
    for layer in range(layers):
        own = weights[layer]
        for text in range(texts):
            _normalise(x[text], norms[layer, 0], eps, normed[text])
        for part in prange(threads):
            _times(own[_QUERY], like, normed, query, part, threads)
            _times(own[_KEY], like, normed, key, part, threads)
            _times(own[_VALUE], like, normed, value, part, threads)
        if biases.shape[1]:
            first, second = query_heads * dim, (query_heads + kv_heads) * dim
            for text in range(texts):
                _add(query[text], biases[layer, :first])
                _add(key[text], biases[layer, first:second])
                _add(value[text], biases[layer, second:])
        for part in prange(threads):
            for head in range(part, heads, threads):
                text, number = head // kv_heads, head % kv_heads
                if head_norms.shape[1]:
                    _normalise(keys[head], head_norms[layer, 1], eps, keys[head])
                _rotate(keys[head], cos[text], sin[text])
                for row in range(group):
                    vector = by_head[head, row]
                    if head_norms.shape[1]:
                        _normalise(vector, head_norms[layer, 0], eps, vector)
                    for n in range(dim):
                        vector[n] *= scaling
                    if rotated.shape[1]:
                        rotated[head, row] = vector
                        _rotate(rotated[head, row], turns[0, layer, text, number], turns[1, layer, text, number])
                    _rotate(vector, cos[text], sin[text])
                _enter(head_table[layer, text, number], keys[head], values[head], like)
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
        for text in range(texts):
            _add(x[text], added[text])
        for text in range(texts):
            _normalise(x[text], norms[layer, 1], eps, normed[text])
        for part in prange(threads):
            _times(own[_GATE], like, normed, gate, part, threads)
            _times(own[_UP], like, normed, up, part, threads)
            start, end = _share(inner, part, threads)
            for text in range(texts):
                for n in range(start, end):
                    up[text, n] *= gate[text, n] / (np.float32(1) + exp(-gate[text, n]))
        for part in prange(threads):
            _times(own[_DOWN], like, up, added, part, threads)
        for text in range(texts):
            _add(x[text], added[text])
    for text in range(texts):
        _normalise(x[text], last_norm, eps, normed[text])
    for part in prange(threads):
        _times(unembedding, like, normed, logits, part, threads)
