"""One token through a decoder on a CPU, compiled: rows of weights times a vector, and attention over heads of any length.

A decode step reads every weight and every kept key once, so it is as fast as memory is if nothing else takes time. All layers
are one call: torch and Python would add some 300 calls of ten microseconds. Weights, keys and values stay where torch has them
and are reached by their addresses; they are float32, or bfloat16 (held as uint16, which is what numba knows), sums are float32.

Heads have a row each in a table of addresses and numbers (`Field`); decode.py fills it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic


class Weight(IntEnum):
    """Matrices of a layer, [out, in], in the table of their addresses."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    OUTPUT = 3
    GATE = 4
    UP = 5
    DOWN = 6


class Field(IntEnum):
    """What the table says of a KV head: addresses of its own buffers, and where the new token goes.

    KEYS, VALUES: [slots, dim]. VISIBLE: bool [slots]. SCORES: float32 [floating keys]. WEIGHTS: float32 [features], of scores.
    SINK, FLOATING: slots in front of the ring, FLOATING of them with a key at this time. END: slots in use once the
    new token is in. SLOT: its own, -1 for none. LEAVING: the column of the token that leaves the window, -1 for none.
    """

    KEYS = 0
    VALUES = 1
    VISIBLE = 2
    SCORES = 3
    WEIGHTS = 4
    SINK = 5
    FLOATING = 6
    END = 7
    SLOT = 8
    LEAVING = 9


# The numbers, for the compiler, which takes no enumerations inside arrays' indices.
_QUERY, _KEY, _VALUE, _OUTPUT, _GATE, _UP, _DOWN = (int(w) for w in Weight)
_KEYS, _VALUES, _VISIBLE, _SCORES, _WEIGHTS, _SINK, _FLOATING, _END, _SLOT, _LEAVING = (int(f) for f in Field)

_FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}  # sums in any order; infinities are real here
_I32, _F32, _I16 = ir.IntType(32), ir.FloatType(), ir.IntType(16)


@intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to elements of the dtype of the array `like`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def _wide(context: Any, value: Any) -> Any:
    """float32 of a float32, or of a bfloat16 that is held as uint16."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(value), generate


@intrinsic
def _narrow(context: Any, value: Any, like: Any) -> Any:
    """A float32 as an element of the array `like`, rounded to the nearest even bfloat16 if that is what it holds."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like.dtype == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)

    return like.dtype(types.float32, like), generate


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """2 to the power of an int32 between -126 and 127, as float32."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.int32), generate


@njit(fastmath=_FAST)
def _exp(x: Any) -> Any:
    """e^x within 3e-7 of its value, x taken between -87 and 88. Unlike a call of the mathematics library it is vectorised."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * _power_of_two(np.int32(n))


@njit
def _share(size: Any, part: Any, parts: Any) -> Any:
    """Start and end of a part of `size` rows."""
    return size * part // parts, size * (part + 1) // parts


@njit(fastmath=_FAST)
def _times(address: Any, like: Any, x: Any, out: Any, part: Any, parts: Any) -> None:
    """A part of the rows of out = W x. W: at `address`, [len(out), len(x)]; x, out: float32."""
    columns = x.shape[0]
    start, end = _share(out.shape[0], part, parts)
    weight = carray(_pointer(address, like), (out.shape[0], columns))
    for row in range(start, end):
        total = np.float32(0)
        for column in range(columns):
            total += _wide(weight[row, column]) * x[column]
        out[row] = total


@njit(fastmath=_FAST)
def _normalise(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """RMSNorm of float32 [n]."""
    total = np.float32(0)
    for n in range(x.shape[0]):
        total += x[n] * x[n]
    scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + eps)
    for n in range(x.shape[0]):
        out[n] = x[n] * scale * weight[n]


@njit(fastmath=_FAST)
def _rotate(x: Any, cos: Any, sin: Any) -> None:
    """Rotary position, in place. x: float32 [dim or more]; cos, sin: [rotated]: the first coordinates are turned."""
    half = cos.shape[0] // 2
    for n in range(half):
        a, b = x[n], x[n + half]
        x[n] = a * cos[n] - b * sin[n]
        x[n + half] = b * cos[n + half] + a * sin[n + half]


@njit(fastmath=_FAST)
def _score(key: Any, value: Any, weights: Any) -> Any:
    """The score of a key (scores.py): float32. key, value: [dim] as they are held; weights: float32 [features]."""
    dim = key.shape[0]
    half, total = dim // 2, np.float32(0)
    for n in range(dim):
        total += _wide(key[n]) * weights[n] + _wide(value[n]) * weights[dim + half + n]
    for n in range(half):
        a, b = _wide(key[n]), _wide(key[half + n])
        total += np.sqrt(a * a + b * b) * weights[dim + n]
    return total


@njit(fastmath=_FAST)
def _enter(head: Any, key: Any, value: Any, like: Any) -> None:
    """Let a token into a head, and move the one that leaves the window for it. key, value: float32 [dim]."""
    dim, sink, slot, leaving = key.shape[0], head[_SINK], head[_SLOT], head[_LEAVING]
    floating = head[_FLOATING]
    slots = max(head[_END], sink + floating, slot + 1)
    keys = carray(_pointer(head[_KEYS], like), (slots, dim))
    values = carray(_pointer(head[_VALUES], like), (slots, dim))
    visible = carray(_pointer(head[_VISIBLE], np.empty(0, np.uint8)), slots)
    if leaving >= 0:
        if slot >= 0:
            old_key, old_value = keys[slot], values[slot]
        else:  # there is no window: it leaves at once
            old_key, old_value = np.empty_like(keys[0]), np.empty_like(keys[0])
            for n in range(dim):
                old_key[n], old_value[n] = _narrow(key[n], like), _narrow(value[n], like)
        target = -1
        if leaving < sink:
            target = leaving
        elif floating:
            scores = carray(_pointer(head[_SCORES], np.empty(0, np.float32)), floating)
            weights = carray(_pointer(head[_WEIGHTS], np.empty(0, np.float32)), 2 * dim + dim // 2)
            worth, least = _score(old_key, old_value, weights), 0
            for n in range(floating):
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
            keys[slot, n], values[slot, n] = _narrow(key[n], like), _narrow(value[n], like)
        visible[slot] = 1


@njit(fastmath=_FAST)
def _attend(
    head: Any, like: Any, query: Any, turned: Any, logits: Any, top: Any, total: Any, out: Any, part: Any, parts: Any
) -> None:
    """A part of the keys of a KV head, for all of its queries.

    query: float32 [group, dim], scaled. turned: the same as they look at the first tokens, or [0, dim]. logits: scratch,
    float32 [group, slots or more]. Written: top, the largest logit, total, the sum of e^(logit - top), float32 [group]; out,
    the sum of values with these weights, float32 [group, dim].
    """
    group, dim = query.shape
    size = head[_END]
    start, end = _share(size, part, parts)
    keys = carray(_pointer(head[_KEYS], like), (size, dim))
    values = carray(_pointer(head[_VALUES], like), (size, dim))
    visible = carray(_pointer(head[_VISIBLE], np.empty(0, np.uint8)), size)
    for slot in range(start, end):
        for row in range(0, group - 1, 2):  # two at once, so that a key is widened once for both
            one, two = np.float32(0), np.float32(0)
            for n in range(dim):
                wide = _wide(keys[slot, n])
                one += wide * query[row, n]
                two += wide * query[row + 1, n]
            logits[row, slot], logits[row + 1, slot] = one, two
        if group % 2:
            one = np.float32(0)
            for n in range(dim):
                one += _wide(keys[slot, n]) * query[group - 1, n]
            logits[group - 1, slot] = one
        if slot < head[_SINK]:
            for row in range(turned.shape[0]):
                one = np.float32(0)
                for n in range(dim):
                    one += _wide(keys[slot, n]) * turned[row, n]
                logits[row, slot] = one
        if not visible[slot]:
            for row in range(group):
                logits[row, slot] = -np.inf
    sums = np.zeros((group, dim), np.float32)
    for row in range(group):
        most = np.float32(-np.inf)
        for slot in range(start, end):
            most = max(most, logits[row, slot])
        top[row], sum_ = most, np.float32(0)
        if most > -np.inf:
            for slot in range(start, end):
                share = _exp(logits[row, slot] - most)
                logits[row, slot] = share
                sum_ += share
        total[row] = sum_
    slot = start
    while slot < end:  # four keys at once, so that sums are read and written once for four
        a, b, c, d = slot, min(slot + 1, end - 1), min(slot + 2, end - 1), min(slot + 3, end - 1)
        for row in range(group):
            if top[row] > -np.inf:
                of_a = logits[row, a]
                of_b = logits[row, b] if slot + 1 < end else np.float32(0)
                of_c = logits[row, c] if slot + 2 < end else np.float32(0)
                of_d = logits[row, d] if slot + 3 < end else np.float32(0)
                for n in range(dim):
                    of_ab = of_a * _wide(values[a, n]) + of_b * _wide(values[b, n])
                    sums[row, n] += of_ab + of_c * _wide(values[c, n]) + of_d * _wide(values[d, n])
        slot += 4
    for row in range(group):
        for n in range(dim):
            out[row, n] = sums[row, n]


@njit(fastmath=_FAST)
def _combine(top: Any, total: Any, out: Any, result: Any) -> None:
    """Parts of the keys put together. top, total: float32 [parts]; out: [parts, dim]; result: [dim], 0 if no key was seen."""
    most, sum_ = np.max(top), np.float32(0)
    for n in range(result.shape[0]):
        result[n] = 0
    if most == -np.inf:
        return
    for part in range(top.shape[0]):
        if top[part] > -np.inf:
            share = _exp(top[part] - most)
            sum_ += share * total[part]
            for n in range(result.shape[0]):
                result[n] += share * out[part, n]
    for n in range(result.shape[0]):
        result[n] /= sum_


@njit(fastmath=_FAST, parallel=True, nogil=True, cache=True)
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
    scratch: Any,
    like: Any,
    inner: Any,
    scaling: Any,
    eps: Any,
    threads: Any,
) -> None:
    """One token through all layers.

    weights: int64 [layers, len(Weight)] addresses; head_table: int64 [layers, KV heads, len(Field)]. norms: float32 [layers,
    2, hidden], before attention and before the MLP. head_norms: float32 [layers, 2, dim] of queries and keys, or [layers, 0,
    dim]. biases: float32 [layers, (query heads + 2 KV heads) x dim], or [layers, 0]. last_norm: float32 [hidden];
    unembedding: address of [vocabulary, hidden]. x: float32 [hidden], the token's embedding, overwritten. cos, sin: float32
    [rotated]. turns: float32 [2, layers, KV heads, rotated], cos and sin of the place from which a head looks at the first
    tokens, or [2, layers, 0, 0]. logits: float32 [vocabulary], written. scratch: float32 [query heads, slots or more]. like:
    an empty array of the weights' dtype. inner: the MLP's width.
    """
    layers, kv_heads, _ = head_table.shape
    hidden, query_heads, dim = x.shape[0], scratch.shape[0], head_norms.shape[2]
    group = query_heads // kv_heads
    normed, added = np.empty(hidden, np.float32), np.empty(hidden, np.float32)
    rows = np.empty((query_heads + 2 * kv_heads) * dim, np.float32)
    query, key, value = rows[: query_heads * dim], rows[query_heads * dim : -kv_heads * dim], rows[-kv_heads * dim :]
    top, total = np.empty((query_heads, threads), np.float32), np.empty((query_heads, threads), np.float32)
    parts = np.empty((query_heads, threads, dim), np.float32)
    attended = np.empty((query_heads, dim), np.float32)
    by_head, flat = query.reshape((kv_heads, group, dim)), attended.reshape(-1)
    turned = np.empty((kv_heads, group if turns.shape[2] else 0, dim), np.float32)
    gate, up = np.empty(inner, np.float32), np.empty(inner, np.float32)
    for layer in range(layers):
        own = weights[layer]
        _normalise(x, norms[layer, 0], eps, normed)
        for part in prange(threads):
            _times(own[_QUERY], like, normed, query, part, threads)
            _times(own[_KEY], like, normed, key, part, threads)
            _times(own[_VALUE], like, normed, value, part, threads)
        if biases.shape[1]:
            for n in range(rows.shape[0]):
                rows[n] += biases[layer, n]
        for head in range(query_heads + kv_heads):
            vector, is_key = rows[head * dim : (head + 1) * dim], head >= query_heads
            if head_norms.shape[1]:
                _normalise(vector, head_norms[layer, 1 if is_key else 0], eps, vector)
            if not is_key:
                for n in range(dim):
                    vector[n] *= scaling
                if turned.shape[1]:
                    own_turned = turned[head // group, head % group]
                    own_turned[:] = vector
                    _rotate(own_turned, turns[0, layer, head // group], turns[1, layer, head // group])
            _rotate(vector, cos, sin)
        for head in range(kv_heads):
            place = slice(head * dim, (head + 1) * dim)
            _enter(head_table[layer, head], key[place], value[place], like)
        for part in prange(threads):
            for head in range(kv_heads):
                of = slice(head * group, (head + 1) * group)
                out = parts[of, part]
                _attend(
                    head_table[layer, head],
                    like,
                    by_head[head],
                    turned[head],
                    scratch[of],
                    top[of, part],
                    total[of, part],
                    out,
                    part,
                    threads,
                )
        for head in range(query_heads):
            _combine(top[head], total[head], parts[head], attended[head])
        for part in prange(threads):
            _times(own[_OUTPUT], like, flat, added, part, threads)
        for n in range(hidden):
            x[n] += added[n]
        _normalise(x, norms[layer, 1], eps, normed)
        for part in prange(threads):
            _times(own[_GATE], like, normed, gate, part, threads)
            _times(own[_UP], like, normed, up, part, threads)
            start, end = _share(inner, part, threads)
            for n in range(start, end):
                up[n] *= gate[n] / (np.float32(1) + _exp(-gate[n]))
        for part in prange(threads):
            _times(own[_DOWN], like, up, added, part, threads)
        for n in range(hidden):
            x[n] += added[n]
    _normalise(x, last_norm, eps, normed)
    for part in prange(threads):
        _times(unembedding, like, normed, logits, part, threads)
