"""Mixtures of experts in a compiled decode step: routing, and the experts that a token chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from headsink.attention.cpu.elements import FAST, exp, pointer, wide
from headsink.attention.cpu.memory import AHEAD, fetch
from headsink.decoding.activations import activation
from headsink.decoding.codes import (
    BIAS,
    CAP_AT,
    CHOSEN,
    COLUMNS,
    INPUT,
    INTEGERS,
    KIND,
    LATE,
    OUTPUT,
    SCALE,
    SHARES,
    SIGMOID,
    SOFTMAX,
    TOP_K,
    WEIGHT,
    WIDTH,
    floats,
)


@njit(fastmath=FAST)
def route(op: Any, scale: Any, sequences: Any) -> None:
    """Choose the experts with the highest scores, and their shares of the output."""
    experts, top_k = op[WIDTH], op[TOP_K]
    chosen = carray(pointer(op[CHOSEN], INTEGERS), (sequences, top_k))
    shares, logits = floats(op[SHARES], (sequences, top_k)), floats(op[INPUT], (sequences, experts))
    scores, taken = np.empty(experts, np.float32), np.empty(experts, np.bool_)
    for sequence in range(sequences):
        if op[KIND] == SOFTMAX:
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
                score = scores[n] + (floats(op[BIAS], experts)[n] if op[BIAS] else np.float32(0))
                if not taken[n] and (best < 0 or score > highest):
                    best, highest = n, score
            taken[best] = True
            chosen[sequence, place], shares[sequence, place] = best, scores[best]
            total += scores[best]
        for place in range(top_k):
            shares[sequence, place] *= scale / total if op[LATE] else scale


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
def experts_in(op: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    """Compute columns `start` to `end` of the inner activations of every chosen expert."""
    columns, width, top_k = op[COLUMNS], op[WIDTH], op[TOP_K]
    row_bytes = columns * like.itemsize
    chosen = carray(pointer(op[CHOSEN], INTEGERS), (sequences, top_k))
    x, out = floats(op[INPUT], (sequences, columns)), floats(op[OUTPUT], (sequences, top_k, width))
    for sequence in range(sequences):
        for n in range(top_k):
            expert = op[WEIGHT] + chosen[sequence, n] * 2 * width * row_bytes
            for row in range(start, end):
                gate = _product(expert + row * row_bytes, like, columns, x[sequence])
                up = _product(expert + (width + row) * row_bytes, like, columns, x[sequence])
                out[sequence, n, row] = activation(gate, op[KIND]) * up


@njit(fastmath=FAST)
def experts_out(op: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    """Compute columns `start` to `end` of the weighted outputs of the chosen experts."""
    columns, width, top_k = op[COLUMNS], op[WIDTH], op[TOP_K]
    row_bytes = columns * like.itemsize
    chosen = carray(pointer(op[CHOSEN], INTEGERS), (sequences, top_k))
    shares, out = floats(op[SHARES], (sequences, top_k)), floats(op[OUTPUT], (sequences, width))
    x = floats(op[INPUT], (sequences, top_k, columns))
    for sequence in range(sequences):
        for row in range(start, end):
            out[sequence, row] = 0
        for n in range(top_k):
            expert = op[WEIGHT] + chosen[sequence, n] * width * row_bytes
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
def experts_in_transposed(op: Any, numbers: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    columns, width, top_k, limit = op[COLUMNS], op[WIDTH], op[TOP_K], numbers[CAP_AT]
    chosen = carray(pointer(op[CHOSEN], INTEGERS), (sequences, top_k))
    x, out = floats(op[INPUT], (sequences, columns)), floats(op[OUTPUT], (sequences, top_k, width))
    both = np.empty(2 * (end - start), np.float32)
    for sequence in range(sequences):
        for n in range(top_k):
            expert = chosen[sequence, n] * 2 * width
            matrix = op[WEIGHT] + expert * columns * like.itemsize
            _add_rows(matrix, like, columns, 2 * width, x[sequence], 2 * start, both)
            bias = floats(op[BIAS] + expert * 4, 2 * width)
            for row in range(start, end):
                at = 2 * (row - start)
                gate = min(both[at] + bias[2 * row], limit)
                up = max(min(both[at + 1] + bias[2 * row + 1], limit), -limit)
                out[sequence, n, row] = (up + 1) * gate * activation(numbers[SCALE] * gate, SIGMOID)


@njit(fastmath=FAST)
def experts_out_transposed(op: Any, like: Any, sequences: Any, start: Any, end: Any) -> None:
    columns, width, top_k = op[COLUMNS], op[WIDTH], op[TOP_K]
    chosen = carray(pointer(op[CHOSEN], INTEGERS), (sequences, top_k))
    shares, out = floats(op[SHARES], (sequences, top_k)), floats(op[OUTPUT], (sequences, width))
    x, found = floats(op[INPUT], (sequences, top_k, columns)), np.empty(end - start, np.float32)
    for sequence in range(sequences):
        out[sequence, start:end] = 0
        for n in range(top_k):
            expert = chosen[sequence, n] * width
            _add_rows(op[WEIGHT] + expert * columns * like.itemsize, like, columns, width, x[sequence, n], start, found)
            bias = floats(op[BIAS] + expert * 4, width)
            for row in range(start, end):
                out[sequence, row] += shares[sequence, n] * (found[row - start] + bias[row])
