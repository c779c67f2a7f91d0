"""The kernel of the compiled decode step on a CPU: one token or a few of every sequence through all layers.

A decode step reads every weight and every cached key once, so memory bandwidth limits it if nothing else takes time. All layers
are one call, because torch and Python would add about 300 calls of ten microseconds. What a layer computes is a list of
operations, a row of a table each (decoding/fields.py), so one kernel runs every family. Several tokens of a sequence are rows of
the buffers, as several sequences are, and read every weight once. Logits of a token are the same bits in any company: sums of
products are added in an order that depends on their length only.

Weights, keys and values stay in torch's memory and are accessed by address. They are float32, or bfloat16 (as uint16, since numba
has no bfloat16). Activations, sums, norms and biases are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from headsink.attention.cpu.decode import BLOCK, append, attend_part, cap, combine, share
from headsink.attention.cpu.elements import FAST
from headsink.attention.cpu.vectors import products_in_order
from headsink.decoding.activations import activation, xielu
from headsink.decoding.codes import (
    ACTIVATE,
    ADD,
    ATTEND_OP,
    BIAS,
    CAP,
    CAP_AT,
    COLUMNS,
    COS,
    END,
    EPS,
    EXPERTS_IN,
    EXPERTS_IN_T,
    EXPERTS_OUT,
    EXPERTS_OUT_T,
    FIRST,
    GATE,
    GROUP,
    INPUT,
    INTERLEAVED,
    KEY,
    KEY_NORM,
    KIND,
    KV_HEADS,
    LATE,
    LAYER,
    LINEAR,
    NORM,
    OP,
    OUTPUT,
    PAIRS,
    PERIOD,
    QUERY,
    QUERY_NORM,
    ROUTE,
    SCALE,
    SIN,
    SINKS,
    STRIDE,
    TOGETHER,
    TURN,
    VALUE,
    WEIGHT,
    WIDTH,
    XIELU,
    floats,
)
from headsink.decoding.experts import experts_in, experts_in_transposed, experts_out, experts_out_transposed, route


@njit(fastmath=FAST)
def _norm(x: Any, weight: Any, bias: Any, kind: Any, eps: Any, out: Any) -> None:
    """RMS norm or layer norm of float32 [n]. weight, bias: addresses, 0 for none."""
    size = x.shape[0]
    mean, total = np.float32(0), np.float32(0)
    if kind == LAYER:
        for n in range(size):
            mean += x[n]
        mean /= np.float32(size)
    for n in range(size):
        total += (x[n] - mean) * (x[n] - mean)
    scale = np.float32(1) / np.sqrt(total / np.float32(size) + eps)
    for n in range(size):
        out[n] = (x[n] - mean) * scale
    if weight:
        factors = floats(weight, size)
        for n in range(size):
            out[n] *= factors[n]
    if bias:
        added = floats(bias, size)
        for n in range(size):
            out[n] += added[n]


@njit(fastmath=FAST)
def _rotate(x: Any, cos: Any, sin: Any, interleaved: Any) -> None:
    """Rotary position, in place. x: float32 [dim]; cos, sin: [pairs]; further coordinates stay."""
    pairs = cos.shape[0]
    if interleaved:
        for n in range(pairs):
            a, b = x[2 * n], x[2 * n + 1]
            x[2 * n] = a * cos[n] - b * sin[n]
            x[2 * n + 1] = b * cos[n] + a * sin[n]
        return
    for n in range(pairs):
        a, b = x[n], x[n + pairs]
        x[n] = a * cos[n] - b * sin[n]
        x[n + pairs] = b * cos[n] + a * sin[n]


@njit(fastmath=FAST)
def _linear(op: Any, scale: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    """Compute columns `start` to `end` of LINEAR."""
    columns, stride = op[COLUMNS], op[STRIDE]
    at = op[WEIGHT] + start * columns * like.itemsize
    products_in_order(at, like, end - start, columns, op[INPUT], sequences, op[OUTPUT] + start * 4, stride)
    if op[BIAS] or scale != 1:
        for sequence in range(sequences):
            out = floats(op[OUTPUT] + sequence * stride * 4, op[WIDTH])
            if op[BIAS]:
                bias = floats(op[BIAS], op[WIDTH])
                for n in range(start, end):
                    out[n] += bias[n]
            for n in range(start, end):
                out[n] *= scale


@njit(fastmath=FAST)
def _columns(op: Any, numbers: Any, like: Any, sequences: Any, part: Any, parts: Any) -> None:
    """Compute part of the columns of an operation."""
    code, scale, kind = op[OP], numbers[SCALE], op[KIND]
    start, end = share(op[WIDTH], part, parts)
    if code == LINEAR:
        _linear(op, scale, like, sequences, start, end)
        return
    if code == EXPERTS_IN:
        experts_in(op, like, sequences, start, end)
        return
    if code == EXPERTS_OUT:
        experts_out(op, like, sequences, start, end)
        return
    if code == EXPERTS_IN_T:
        experts_in_transposed(op, numbers, like, sequences, start, end)
        return
    if code == EXPERTS_OUT_T:
        experts_out_transposed(op, like, sequences, start, end)
        return
    for sequence in range(sequences):
        out = floats(op[OUTPUT] + sequence * op[STRIDE] * 4, op[WIDTH])
        x = floats(op[INPUT] + sequence * op[COLUMNS] * 4, op[COLUMNS])
        if code == GATE and op[COLUMNS] == 1:  # one gate for all columns
            factor = activation(x[0], kind)
            for n in range(start, end):
                out[n] *= factor
        elif code == GATE:
            for n in range(start, end):
                out[n] *= activation(x[n], kind)
        elif code == ACTIVATE:
            for n in range(start, end):
                out[n] = activation(out[n], kind)
        elif code == XIELU:
            for n in range(start, end):
                out[n] = xielu(out[n], numbers)
        elif code == ADD:
            for n in range(start, end):
                out[n] += scale * x[n]
        elif code == CAP:
            for n in range(start, end):
                out[n] = cap(out[n], scale)


@njit(fastmath=FAST)
def _norm_groups(op: Any, eps: Any, sequences: Any) -> None:
    width, columns, period = op[WIDTH], op[COLUMNS], max(op[PERIOD], 1)
    for sequence in range(sequences):
        for group in range(width // columns):
            begin = (sequence * width + group * columns) * 4
            weight = op[WEIGHT] + group % period * columns * 4 if op[WEIGHT] else 0
            x, out = floats(op[INPUT] + begin, columns), floats(op[OUTPUT] + begin, columns)
            _norm(x, weight, op[BIAS], op[KIND], eps, out)


@njit(fastmath=FAST)
def _turn_head(x: Any, op: Any, norm: Any, eps: Any, cos: Any, sin: Any) -> None:
    """Normalise and rotate the query or the key of a head, in place. norm: address of its weight, 0 for none."""
    if norm and not op[LATE]:
        _norm(x, norm, 0, op[KIND], eps, x)
    _rotate(x, cos, sin, op[INTERLEAVED])
    if norm and op[LATE]:
        _norm(x, norm, 0, op[KIND], eps, x)


@njit(fastmath=FAST)
def _append_head(
    op: Any,
    numbers: Any,
    key_like: Any,
    value_like: Any,
    row: Any,
    head: Any,
    table: Any,
    query: Any,
    turned: Any,
    turns: Any,
) -> None:
    """Finish the query, key and value of a head, and append them to its cache.

    row: of the buffers, one per sequence and token. head: number of the head among all sequences. query, turned: outputs, float32
    [group, dim], the scaled queries and those for the sink tokens.
    """
    kv_heads, group, dim, pairs = op[KV_HEADS], op[GROUP], op[COLUMNS], op[PAIRS]
    number = head % kv_heads
    at, eps, period = (row * kv_heads + number) * dim * 4, numbers[EPS], max(op[PERIOD], 1)
    key, value = floats(op[KEY] + at, dim), floats(op[VALUE] + at, dim)
    given = floats(op[QUERY] + at * group, (group, dim))
    cos, sin = floats(op[COS] + row * pairs * 4, pairs), floats(op[SIN] + row * pairs * 4, pairs)
    norm = op[KEY_NORM] + number % period * dim * 4 if op[KEY_NORM] else 0
    _turn_head(key, op, norm, eps, cos, sin)
    for one in range(group):
        norm = op[QUERY_NORM] + (number * group + one) % period * dim * 4 if op[QUERY_NORM] else 0
        _turn_head(given[one], op, norm, eps, cos, sin)
        for n in range(dim):
            query[one, n] = given[one, n] * numbers[SCALE]
        if turned.shape[0]:
            turned[one] = query[one]
            _rotate(turned[one], turns[0, op[TURN], head], turns[1, op[TURN], head], op[INTERLEAVED])
    append(table, key, value, key_like, value_like)


@njit
def _at_once(heads: Any, first: Any, count: Any) -> Any:
    """How many tokens a layer appends before it attends: all of them if no key leaves a window.

    heads: int64 [tokens, heads of all layers, fields]; first, count: those of the layer.
    """
    tokens = heads.shape[0]
    for head in range(first, first + count):
        if heads[tokens - 1, head, END] - heads[0, head, END] < tokens - 1:
            return 1
    return tokens


@njit(fastmath=FAST, parallel=True, nogil=True, cache=True)
def run(
    operations: Any,
    numbers: Any,
    heads: Any,
    turns: Any,
    scratch: Any,
    like: Any,
    key_like: Any,
    value_like: Any,
    sequences: Any,
    threads: Any,
) -> None:
    """Run a list of operations.

    operations: int64 [operations, len(Field)]; numbers: float32 [operations, len(Number)]. heads: int64 [tokens, heads of all
    layers, len(KVField)], of every layer sequence by sequence, for each new token of a sequence. turns: float32 [2, layers,
    sequences x KV heads, pairs], cos and sin of the angle by which queries are rotated for the sink tokens (cache-relative
    positions). scratch: float32, for the largest layer threads x sequences x tokens x query heads x (head size + 2). like,
    key_like, value_like: empty arrays of the dtype of the weights, and of the cached keys and values. Row s x tokens + t of a
    buffer belongs to token t of sequence s.
    """
    number, tokens = 0, heads.shape[0]
    rows = sequences * tokens
    while number < operations.shape[0]:
        op, together = operations[number], operations[number, TOGETHER]
        if op[OP] == NORM:
            _norm_groups(op, numbers[number, EPS], rows)
        elif op[OP] == ROUTE:
            route(op, numbers[number, SCALE], rows)
        elif op[OP] == ATTEND_OP:
            kv_heads, group, dim, first = op[KV_HEADS], op[GROUP], op[COLUMNS], op[FIRST]
            count, softcap = sequences * kv_heads, numbers[number, CAP_AT]
            step = _at_once(heads, first, count)
            queries = group * step
            size = count * threads * queries
            top, total = (
                scratch[:size].reshape((count, threads, queries)),
                scratch[size : 2 * size].reshape((count, threads, queries)),
            )
            parts = scratch[2 * size : (2 + dim) * size].reshape((count, threads, queries, dim))
            query = np.empty((count, group, step, dim), np.float32)
            turned = np.empty((count, group if op[TURN] >= 0 else 0, step, dim), np.float32)
            attended = floats(op[OUTPUT], (rows, kv_heads, group, dim))
            for begin in range(0, tokens, step):
                for part in prange(threads):
                    for head in range(part, count, threads):
                        for token in range(step):
                            _append_head(
                                op,
                                numbers[number],
                                key_like,
                                value_like,
                                head // kv_heads * tokens + begin + token,
                                head,
                                heads[begin + token, first + head],
                                query[head, :, token],
                                turned[head, :, token],
                                turns,
                            )
                for part in prange(threads):
                    logits = np.empty((queries + 1, BLOCK), np.float32)
                    for head in range(count):
                        sums = top[head, part], total[head, part], parts[head, part]
                        attend_part(
                            heads[begin + step - 1, first + head],
                            key_like,
                            value_like,
                            query[head].reshape((queries, dim)),
                            turned[head].reshape((turned.shape[1] * step, dim)),
                            step,
                            softcap,
                            logits,
                            *sums,
                            (part + head % kv_heads) % threads,  # heads begin in turn with another thread
                            threads,
                        )
                for head in range(count):
                    for one in range(queries):
                        sink = np.float32(-np.inf)
                        if op[SINKS]:
                            sink = floats(op[SINKS], kv_heads * group)[head % kv_heads * group + one // step]
                        row = head // kv_heads * tokens + begin + one % step
                        result = attended[row, head % kv_heads, one // step]
                        combine(top[head, :, one], total[head, :, one], parts[head, :, one], sink, result)
        else:
            for part in prange(threads):
                for n in range(number, number + together):
                    _columns(operations[n], numbers[n], like, rows, part, threads)
        number += together
