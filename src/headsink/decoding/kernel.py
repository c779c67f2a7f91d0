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

import math
from typing import Any

import numpy as np
from numba import carray, njit, prange

from headsink.attention.cpu.decode import BLOCK, append, attend_part, cap, combine, share
from headsink.attention.cpu.elements import FAST, FLOATS, exp, pointer, wide
from headsink.attention.cpu.memory import AHEAD, fetch
from headsink.attention.cpu.vectors import products_in_order
from headsink.attention.kv_table import KVField
from headsink.decoding.fields import Activation, Field, NormKind, Number, Op, Scores

# As numbers, because numba does not support enumerations as array indices.
_OP, _TOGETHER, _INPUT, _OUTPUT, _WIDTH, _COLUMNS, _STRIDE, _WEIGHT, _BIAS, _KIND, _PERIOD, *_ATTEND = (
    int(field) for field in Field
)
_QUERY, _KEY, _VALUE, _FIRST, _KV_HEADS, _GROUP, _COS, _SIN, _PAIRS, _INTERLEAVED, *_REST = _ATTEND
_QUERY_NORM, _KEY_NORM, _LATE, _SINKS, _TURN, _CHOSEN, _SHARES, _TOP_K = _REST
_SCALE, _EPS, _CAP_AT, _BETA = (number.value for number in Number)
_NORM, _ATTEND_OP, _ROUTE, _LINEAR, _GATE, _ACTIVATE, _ADD, _CAP, *_MORE = (int(op) for op in Op)
_EXPERTS_IN, _EXPERTS_OUT, _EXPERTS_IN_T, _EXPERTS_OUT_T, _XIELU = _MORE
_SILU, _GELU_TANH, _GELU, _RELU, _RELU_SQUARED, _SIGMOID = (int(kind) for kind in Activation)
_END = int(KVField.END)
_RMS, _LAYER = (int(kind) for kind in NormKind)
_SOFTMAX, _ = (int(kind) for kind in Scores)
_INTEGERS = np.empty(0, np.int64)


@njit
def _floats(address: Any, shape: Any) -> Any:
    return carray(pointer(address, FLOATS), shape)


@njit(fastmath=FAST)
def _activation(x: Any, kind: Any) -> Any:
    if kind == _SILU:
        return x / (np.float32(1) + exp(-x))
    if kind == _GELU_TANH:
        inner = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
        return x / (np.float32(1) + exp(-inner))
    if kind == _GELU:
        return x * np.float32(0.5 * (1 + math.erf(x * 0.7071067811865476)))
    if kind == _SIGMOID:
        return np.float32(1) / (np.float32(1) + exp(-x))
    positive = max(x, np.float32(0))
    return positive if kind == _RELU else positive * positive


@njit(fastmath=FAST)
def _norm(x: Any, weight: Any, bias: Any, kind: Any, eps: Any, out: Any) -> None:
    """RMS norm or layer norm of float32 [n]. weight, bias: addresses, 0 for none."""
    size = x.shape[0]
    mean, total = np.float32(0), np.float32(0)
    if kind == _LAYER:
        for n in range(size):
            mean += x[n]
        mean /= np.float32(size)
    for n in range(size):
        total += (x[n] - mean) * (x[n] - mean)
    scale = np.float32(1) / np.sqrt(total / np.float32(size) + eps)
    for n in range(size):
        out[n] = (x[n] - mean) * scale
    if weight:
        factors = _floats(weight, size)
        for n in range(size):
            out[n] *= factors[n]
    if bias:
        added = _floats(bias, size)
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
def _product(weight: Any, like: Any, columns: Any, x: Any) -> Any:
    """Return the product of a row of a matrix, at an address, and float32 [columns]."""
    row = carray(pointer(weight, like), columns)
    fetch(weight + AHEAD, columns * like.itemsize)
    total = np.float32(0)
    for column in range(columns):
        total += wide(row[column]) * x[column]
    return total


@njit(fastmath=FAST)
def _linear(op: Any, scale: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    """Compute columns `start` to `end` of LINEAR."""
    columns, stride = op[_COLUMNS], op[_STRIDE]
    at = op[_WEIGHT] + start * columns * like.itemsize
    products_in_order(at, like, end - start, columns, op[_INPUT], sequences, op[_OUTPUT] + start * 4, stride)
    if op[_BIAS] or scale != 1:
        for sequence in range(sequences):
            out = _floats(op[_OUTPUT] + sequence * stride * 4, op[_WIDTH])
            if op[_BIAS]:
                bias = _floats(op[_BIAS], op[_WIDTH])
                for n in range(start, end):
                    out[n] += bias[n]
            for n in range(start, end):
                out[n] *= scale


@njit(fastmath=FAST)
def _experts_in(op: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    """Compute columns `start` to `end` of the inner activations of every chosen expert."""
    columns, width, top_k = op[_COLUMNS], op[_WIDTH], op[_TOP_K]
    row_bytes = columns * like.itemsize
    chosen = carray(pointer(op[_CHOSEN], _INTEGERS), (sequences, top_k))
    x, out = _floats(op[_INPUT], (sequences, columns)), _floats(op[_OUTPUT], (sequences, top_k, width))
    for sequence in range(sequences):
        for n in range(top_k):
            expert = op[_WEIGHT] + chosen[sequence, n] * 2 * width * row_bytes
            for row in range(start, end):
                gate = _product(expert + row * row_bytes, like, columns, x[sequence])
                up = _product(expert + (width + row) * row_bytes, like, columns, x[sequence])
                out[sequence, n, row] = _activation(gate, op[_KIND]) * up


@njit(fastmath=FAST)
def _experts_out(op: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    """Compute columns `start` to `end` of the weighted outputs of the chosen experts."""
    columns, width, top_k = op[_COLUMNS], op[_WIDTH], op[_TOP_K]
    row_bytes = columns * like.itemsize
    chosen = carray(pointer(op[_CHOSEN], _INTEGERS), (sequences, top_k))
    shares, out = _floats(op[_SHARES], (sequences, top_k)), _floats(op[_OUTPUT], (sequences, width))
    x = _floats(op[_INPUT], (sequences, top_k, columns))
    for sequence in range(sequences):
        for row in range(start, end):
            out[sequence, row] = 0
        for n in range(top_k):
            expert = op[_WEIGHT] + chosen[sequence, n] * width * row_bytes
            for row in range(start, end):
                found = _product(expert + row * row_bytes, like, columns, x[sequence, n])
                out[sequence, row] += shares[sequence, n] * found


@njit(fastmath=FAST)
def _add_rows(matrix: Any, like: Any, rows: Any, columns: Any, x: Any, first: Any, out: Any) -> None:
    """out = x times a matrix [rows, columns] at an address, of the columns from `first` on."""
    width, stride = out.shape[0], columns * like.itemsize
    out[:] = 0
    row = 0
    while row + 4 <= rows:  # four at a time, so that sums are loaded and stored less often
        at = matrix + row * stride + first * like.itemsize
        a, b = carray(pointer(at, like), width), carray(pointer(at + stride, like), width)
        c, d = carray(pointer(at + 2 * stride, like), width), carray(pointer(at + 3 * stride, like), width)
        xa, xb, xc, xd = x[row], x[row + 1], x[row + 2], x[row + 3]
        for n in range(width):
            out[n] += xa * wide(a[n]) + xb * wide(b[n]) + xc * wide(c[n]) + xd * wide(d[n])
        row += 4
    while row < rows:
        line = carray(pointer(matrix + row * stride + first * like.itemsize, like), width)
        for n in range(width):
            out[n] += x[row] * wide(line[n])
        row += 1


@njit(fastmath=FAST)
def _experts_in_transposed(op: Any, numbers: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    columns, width, top_k, limit = op[_COLUMNS], op[_WIDTH], op[_TOP_K], numbers[_CAP_AT]
    chosen = carray(pointer(op[_CHOSEN], _INTEGERS), (sequences, top_k))
    x, out = _floats(op[_INPUT], (sequences, columns)), _floats(op[_OUTPUT], (sequences, top_k, width))
    both = np.empty(2 * (end - start), np.float32)
    for sequence in range(sequences):
        for n in range(top_k):
            expert = chosen[sequence, n] * 2 * width
            matrix = op[_WEIGHT] + expert * columns * like.itemsize
            _add_rows(matrix, like, columns, 2 * width, x[sequence], 2 * start, both)
            bias = _floats(op[_BIAS] + expert * 4, 2 * width)
            for row in range(start, end):
                at = 2 * (row - start)
                gate = min(both[at] + bias[2 * row], limit)
                up = max(min(both[at + 1] + bias[2 * row + 1], limit), -limit)
                out[sequence, n, row] = (up + 1) * gate * _activation(numbers[_SCALE] * gate, _SIGMOID)


@njit(fastmath=FAST)
def _experts_out_transposed(op: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    columns, width, top_k = op[_COLUMNS], op[_WIDTH], op[_TOP_K]
    chosen = carray(pointer(op[_CHOSEN], _INTEGERS), (sequences, top_k))
    shares, out = _floats(op[_SHARES], (sequences, top_k)), _floats(op[_OUTPUT], (sequences, width))
    x, found = _floats(op[_INPUT], (sequences, top_k, columns)), np.empty(end - start, np.float32)
    for sequence in range(sequences):
        out[sequence, start:end] = 0
        for n in range(top_k):
            expert = chosen[sequence, n] * width
            _add_rows(
                op[_WEIGHT] + expert * columns * like.itemsize, like, columns, width, x[sequence, n], start, found
            )
            bias = _floats(op[_BIAS] + expert * 4, width)
            for row in range(start, end):
                out[sequence, row] += shares[sequence, n] * (found[row - start] + bias[row])


@njit(fastmath=FAST)
def _xielu(x: Any, numbers: Any) -> Any:
    linear = numbers[_BETA] * x
    if x > 0:
        return numbers[_SCALE] * x * x + linear
    return np.float32(numbers[_CAP_AT] * (math.expm1(min(x, numbers[_EPS])) - x) + linear)


@njit(fastmath=FAST)
def _columns(op: Any, numbers: Any, like: Any, sequences: Any, part: Any, parts: Any) -> None:
    """Compute part of the columns of an operation."""
    code, scale, kind = op[_OP], numbers[_SCALE], op[_KIND]
    start, end = share(op[_WIDTH], part, parts)
    if code == _LINEAR:
        _linear(op, scale, like, sequences, start, end)
        return
    if code == _EXPERTS_IN:
        _experts_in(op, like, sequences, start, end)
        return
    if code == _EXPERTS_OUT:
        _experts_out(op, like, sequences, start, end)
        return
    if code == _EXPERTS_IN_T:
        _experts_in_transposed(op, numbers, like, sequences, start, end)
        return
    if code == _EXPERTS_OUT_T:
        _experts_out_transposed(op, like, sequences, start, end)
        return
    for sequence in range(sequences):
        out = _floats(op[_OUTPUT] + sequence * op[_STRIDE] * 4, op[_WIDTH])
        x = _floats(op[_INPUT] + sequence * op[_COLUMNS] * 4, op[_COLUMNS])
        if code == _GATE and op[_COLUMNS] == 1:  # one gate for all columns
            factor = _activation(x[0], kind)
            for n in range(start, end):
                out[n] *= factor
        elif code == _GATE:
            for n in range(start, end):
                out[n] *= _activation(x[n], kind)
        elif code == _ACTIVATE:
            for n in range(start, end):
                out[n] = _activation(out[n], kind)
        elif code == _XIELU:
            for n in range(start, end):
                out[n] = _xielu(out[n], numbers)
        elif code == _ADD:
            for n in range(start, end):
                out[n] += scale * x[n]
        elif code == _CAP:
            for n in range(start, end):
                out[n] = cap(out[n], scale)


@njit(fastmath=FAST)
def _norm_groups(op: Any, eps: Any, sequences: Any) -> None:
    width, columns, period = op[_WIDTH], op[_COLUMNS], max(op[_PERIOD], 1)
    for sequence in range(sequences):
        for group in range(width // columns):
            begin = (sequence * width + group * columns) * 4
            weight = op[_WEIGHT] + group % period * columns * 4 if op[_WEIGHT] else 0
            x, out = _floats(op[_INPUT] + begin, columns), _floats(op[_OUTPUT] + begin, columns)
            _norm(x, weight, op[_BIAS], op[_KIND], eps, out)


@njit(fastmath=FAST)
def _route(op: Any, scale: Any, sequences: Any) -> None:
    """Choose the experts with the highest scores, and their shares of the output."""
    experts, top_k = op[_WIDTH], op[_TOP_K]
    chosen = carray(pointer(op[_CHOSEN], _INTEGERS), (sequences, top_k))
    shares, logits = _floats(op[_SHARES], (sequences, top_k)), _floats(op[_INPUT], (sequences, experts))
    scores, taken = np.empty(experts, np.float32), np.empty(experts, np.bool_)
    for sequence in range(sequences):
        if op[_KIND] == _SOFTMAX:
            most, total = np.max(logits[sequence]), np.float32(0)
            for n in range(experts):
                scores[n] = exp(logits[sequence, n] - most)
                total += scores[n]
            for n in range(experts):
                scores[n] /= total
        else:
            for n in range(experts):
                scores[n] = np.float32(1) / (np.float32(1) + exp(-logits[sequence, n]))
        taken[:] = False
        total = np.float32(0)
        for place in range(top_k):
            best, highest = -1, np.float32(-np.inf)
            for n in range(experts):
                score = scores[n] + (_floats(op[_BIAS], experts)[n] if op[_BIAS] else np.float32(0))
                if not taken[n] and (best < 0 or score > highest):
                    best, highest = n, score
            taken[best] = True
            chosen[sequence, place], shares[sequence, place] = best, scores[best]
            total += scores[best]
        for place in range(top_k):
            shares[sequence, place] *= scale / total if op[_LATE] else scale


@njit(fastmath=FAST)
def _turn_head(x: Any, op: Any, norm: Any, eps: Any, cos: Any, sin: Any) -> None:
    """Normalise and rotate the query or the key of a head, in place. norm: address of its weight, 0 for none."""
    if norm and not op[_LATE]:
        _norm(x, norm, 0, op[_KIND], eps, x)
    _rotate(x, cos, sin, op[_INTERLEAVED])
    if norm and op[_LATE]:
        _norm(x, norm, 0, op[_KIND], eps, x)


@njit(fastmath=FAST)
def _append_head(
    op: Any, numbers: Any, like: Any, row: Any, head: Any, table: Any, query: Any, turned: Any, turns: Any
) -> None:
    """Finish the query, key and value of a head, and append them to its cache.

    row: of the buffers, one per sequence and token. head: number of the head among all sequences. query, turned: outputs, float32
    [group, dim], the scaled queries and those for the sink tokens.
    """
    kv_heads, group, dim, pairs = op[_KV_HEADS], op[_GROUP], op[_COLUMNS], op[_PAIRS]
    number = head % kv_heads
    at, eps, period = (row * kv_heads + number) * dim * 4, numbers[_EPS], max(op[_PERIOD], 1)
    key, value = _floats(op[_KEY] + at, dim), _floats(op[_VALUE] + at, dim)
    given = _floats(op[_QUERY] + at * group, (group, dim))
    cos, sin = _floats(op[_COS] + row * pairs * 4, pairs), _floats(op[_SIN] + row * pairs * 4, pairs)
    norm = op[_KEY_NORM] + number % period * dim * 4 if op[_KEY_NORM] else 0
    _turn_head(key, op, norm, eps, cos, sin)
    for one in range(group):
        norm = op[_QUERY_NORM] + (number * group + one) % period * dim * 4 if op[_QUERY_NORM] else 0
        _turn_head(given[one], op, norm, eps, cos, sin)
        for n in range(dim):
            query[one, n] = given[one, n] * numbers[_SCALE]
        if turned.shape[0]:
            turned[one] = query[one]
            _rotate(turned[one], turns[0, op[_TURN], head], turns[1, op[_TURN], head], op[_INTERLEAVED])
    append(table, key, value, like)


@njit
def _at_once(heads: Any, first: Any, count: Any) -> Any:
    """How many tokens a layer appends before it attends: all of them if no key leaves a window.

    heads: int64 [tokens, heads of all layers, fields]; first, count: those of the layer.
    """
    tokens = heads.shape[0]
    for head in range(first, first + count):
        if heads[tokens - 1, head, _END] - heads[0, head, _END] < tokens - 1:
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
    kv_like: Any,
    sequences: Any,
    threads: Any,
) -> None:
    """Run a list of operations.

    operations: int64 [operations, len(Field)]; numbers: float32 [operations, len(Number)]. heads: int64 [tokens, heads of all
    layers, len(KVField)], of every layer sequence by sequence, for each new token of a sequence. turns: float32 [2, layers,
    sequences x KV heads, pairs], cos and sin of the angle by which queries are rotated for the sink tokens (cache-relative
    positions). scratch: float32, for the largest layer threads x sequences x tokens x query heads x (head size + 2). like,
    kv_like: empty arrays of the dtype of the weights, and of the cached keys and values. Row s x tokens + t of a buffer belongs
    to token t of sequence s.
    """
    number, tokens = 0, heads.shape[0]
    rows = sequences * tokens
    while number < operations.shape[0]:
        op, together = operations[number], operations[number, _TOGETHER]
        if op[_OP] == _NORM:
            _norm_groups(op, numbers[number, _EPS], rows)
        elif op[_OP] == _ROUTE:
            _route(op, numbers[number, _SCALE], rows)
        elif op[_OP] == _ATTEND_OP:
            kv_heads, group, dim, first = op[_KV_HEADS], op[_GROUP], op[_COLUMNS], op[_FIRST]
            count, softcap = sequences * kv_heads, numbers[number, _CAP_AT]
            step = _at_once(heads, first, count)
            queries = group * step
            size = count * threads * queries
            top, total = (
                scratch[:size].reshape((count, threads, queries)),
                scratch[size : 2 * size].reshape((count, threads, queries)),
            )
            parts = scratch[2 * size : (2 + dim) * size].reshape((count, threads, queries, dim))
            query = np.empty((count, group, step, dim), np.float32)
            turned = np.empty((count, group if op[_TURN] >= 0 else 0, step, dim), np.float32)
            attended = _floats(op[_OUTPUT], (rows, kv_heads, group, dim))
            for begin in range(0, tokens, step):
                for part in prange(threads):
                    for head in range(part, count, threads):
                        for token in range(step):
                            _append_head(
                                op,
                                numbers[number],
                                kv_like,
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
                            kv_like,
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
                        if op[_SINKS]:
                            sink = _floats(op[_SINKS], kv_heads * group)[head % kv_heads * group + one // step]
                        row = head // kv_heads * tokens + begin + one % step
                        result = attended[row, head % kv_heads, one // step]
                        combine(top[head, :, one], total[head, :, one], parts[head, :, one], sink, result)
        else:
            for part in prange(threads):
                for n in range(number, number + together):
                    _columns(operations[n], numbers[n], like, rows, part, threads)
        number += together
