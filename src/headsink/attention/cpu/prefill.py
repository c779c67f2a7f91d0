"""Prefill attention on a CPU: many queries, each over the keys that it sees, tile by tile.

For every block of queries, the visible keys are gathered in tiles of `KEYS`, transposed so that a vector of sixteen lanes has one
coordinate of sixteen keys. `ROWS` queries at a time are multiplied with a tile, with logits and sums in registers
(attention/cpu/tiles.py). The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv
2205.14135). Keys that no query of a block sees cost nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from headsink.attention.cpu.elements import FAST, narrow, wide
from headsink.attention.cpu.tiles import (
    KEYS,
    LANES,
    ROWS,
    add_products1,
    add_products4,
    fetch,
    online_softmax,
    products_of_tile,
    to_columns,
)

QUERIES = 128  # tokens of a head that share a tile
CACHE_LINE = 64  # bytes


@njit(fastmath=FAST)
def _rescale(before: Any, now: Any) -> Any:
    """Return 2^(before - now), 0 if no key was visible before."""
    return np.float32(0) if before == -np.inf else np.exp2(before - now)


@njit(fastmath=FAST)
def _pack(keys: Any, values: Any, taken: Any, work: Any, key_tile: Any, value_tile: Any) -> None:
    """Write the first `KEYS` keys of `taken` as columns of words, [words, KEYS], and their values as rows, [lines, columns]."""
    dim, words = keys.shape[1], key_tile.shape[0]
    row_bytes = dim * keys.itemsize
    whole, word_bytes = words // LANES * LANES, row_bytes // words
    for first in range(0, KEYS, LANES):
        for n in range(first + KEYS, first + KEYS + LANES):  # prefetch the next tile
            for line in range(0, row_bytes, CACHE_LINE):
                fetch(keys.ctypes.data + taken[n] * row_bytes + line)
                fetch(values.ctypes.data + taken[n] * row_bytes + line)
        for word in range(0, whole, LANES):
            to = key_tile[word:, first:].ctypes.data
            at = keys.ctypes.data + word * word_bytes
            to_columns(at, taken[first:].ctypes.data, row_bytes, to, keys, work)
    if work.itemsize == 2:
        for n in range(KEYS):
            key = keys[taken[n]]
            for word in range(whole, words):
                key_tile[word, n] = np.uint32(key[2 * word]) | np.uint32(key[2 * word + 1]) << np.uint32(16)
        for pair in range(KEYS // 2):
            one, other = values[taken[2 * pair]], values[taken[2 * pair + 1]]
            for column in range(dim):
                value_tile[pair, column] = np.uint32(one[column]) | np.uint32(other[column]) << np.uint32(16)
    else:
        key_numbers, value_numbers = key_tile.view(np.float32), value_tile.view(np.float32)
        for n in range(KEYS):
            key, value = keys[taken[n]], values[taken[n]]
            for word in range(whole, words):
                key_numbers[word, n] = wide(key[word])
            for column in range(dim):
                value_numbers[n, column] = wide(value[column])


@njit(fastmath=FAST)
def _pack_queries(query: Any, tokens: Any, begin: Any, work: Any, rows: Any) -> None:
    """Write queries [group, tokens, dim] from token `begin` on as rows of words, head by head. Unused rows are zero."""
    dim, row = query.shape[2], 0
    for head in range(query.shape[0]):
        for token in range(begin, begin + tokens):
            if work.itemsize == 2:
                for word in range(dim // 2):
                    pair = query[head, token, 2 * word : 2 * word + 2]
                    rows[row, word] = np.uint32(pair[0]) | np.uint32(pair[1]) << np.uint32(16)
            else:
                numbers = rows[row].view(np.float32)
                for column in range(dim):
                    numbers[column] = wide(query[head, token, column])
            row += 1
    rows[row:] = 0


@njit(fastmath=FAST)
def _attend_tile(
    rows: Any,
    row_columns: Any,
    key_tile: Any,
    value_tile: Any,
    columns: Any,
    until: Any,
    scaling: Any,
    work: Any,
    logits: Any,
    shares: Any,
    top: Any,
    total: Any,
    out: Any,
) -> None:
    """Attend from a block of queries to one tile. rows: [queries, words]; row_columns: their columns; the rest as in `attend`."""
    words, width, lines = rows.shape[1], out.shape[1], value_tile.shape[0]
    begun, ended = columns.min(), until.max()
    for row in range(0, rows.shape[0], ROWS):
        if begun > row_columns[row : row + ROWS].max() or ended <= row_columns[row : row + ROWS].min():
            continue
        products_of_tile(
            rows[row:].ctypes.data, words, key_tile.ctypes.data, KEYS, words, logits.ctypes.data, KEYS, work
        )
        for n in range(ROWS):
            most, sum_ = online_softmax(
                logits[n].ctypes.data,
                columns.ctypes.data,
                until.ctypes.data,
                np.int64(row_columns[row + n]),
                scaling,
                top[row + n],
                shares[n].ctypes.data,
                work,
            )
            if most > top[row + n]:
                factor = _rescale(top[row + n], most)
                total[row + n] *= factor
                for column in range(width):
                    out[row + n, column] *= factor
                top[row + n] = most
            total[row + n] += sum_
        for column in range(0, width, LANES):
            matrix, to = value_tile[:, column:].ctypes.data, out[row:, column:].ctypes.data
            if column % (4 * LANES) == 0 and column + 4 * LANES <= width:
                add_products4(shares.ctypes.data, lines, matrix, width, lines, to, width, work)
            elif column >= width // (4 * LANES) * (4 * LANES):
                add_products1(shares.ctypes.data, lines, matrix, width, lines, to, width, work)


@njit(fastmath=FAST, parallel=True, nogil=True, cache=True)
def attend(
    keys: Any,
    values: Any,
    columns: Any,
    until: Any,
    query: Any,
    first: Any,
    scaling: Any,
    work: Any,
    out: Any,
    threads: Any,
) -> None:
    """Attend from queries, each over the keys that it sees. A query without visible keys gets zero.

    keys, values: [heads, keys, dim]; query, out: [heads, group, tokens, dim]: float32, or uint16 for bfloat16. columns: int32
    [keys]; until: int32 [heads, keys]: the query of column c sees keys with columns <= c < until. first: the column of the first
    query. work: an empty array of the dtype of the products: uint16 where the processor and the dtype support it (`PAIRED`), else
    float32.
    """
    heads, group, tokens, dim = query.shape
    words, width = dim * work.itemsize // 4, -(-dim // LANES) * LANES
    lines = KEYS * work.itemsize // 4
    block = min(QUERIES, max(ROWS, -(-heads * tokens // (2 * threads))))  # smaller if threads would be idle
    most_rows, blocks = -(-group * min(block, tokens) // ROWS) * ROWS, -(-tokens // block)
    factor = np.float32(scaling * 1.4426950408889634)
    for part in prange(threads):
        all_rows = np.zeros((most_rows, words), np.uint32)
        key_tile, value_tile = np.zeros((words, KEYS), np.uint32), np.zeros((lines, width), np.uint32)
        logits, shares = np.zeros((ROWS, KEYS), np.float32), np.zeros((ROWS, lines), np.uint32)
        sums, all_top, all_total = (
            np.zeros((most_rows, width), np.float32),
            np.zeros(most_rows, np.float32),
            np.zeros(most_rows, np.float32),
        )
        all_columns = np.zeros(most_rows, np.int32)
        taken = np.zeros(keys.shape[1] + 2 * KEYS, np.int32)
        own_columns, own_until = np.zeros(KEYS, np.int32), np.zeros(KEYS, np.int32)
        for task in range(part, heads * blocks, threads):
            head, start = task // blocks, task % blocks * block
            own = min(block, tokens - start)
            count = -(-group * own // ROWS) * ROWS
            rows, row_columns = all_rows[:count], all_columns[:count]
            top, total, result = all_top[:count], all_total[:count], sums[:count]
            _pack_queries(query[head], own, start, work, rows)
            for row in range(count):
                row_columns[row] = first + start + row % own
                top[row], total[row] = -np.inf, 0
                result[row] = 0
            found, hidden, begin, end = 0, 0, first + start, first + start + own
            for key in range(keys.shape[1]):
                if until[head, key] > begin and columns[key] < end:
                    taken[found] = key
                    found += 1
            while found % KEYS:  # the last tile is padded with a hidden copy of its last key
                taken[found] = taken[found - 1]
                hidden += 1
                found += 1
            for offset in range(0, found, KEYS):
                some = taken[offset : offset + 2 * KEYS]
                _pack(keys[head], values[head], some, work, key_tile, value_tile)
                for n in range(KEYS):
                    own_columns[n] = columns[some[n]]
                    own_until[n] = until[head, some[n]] if offset + n < found - hidden else 0
                _attend_tile(
                    rows,
                    row_columns,
                    key_tile,
                    value_tile,
                    own_columns,
                    own_until,
                    factor,
                    work,
                    logits,
                    shares,
                    top,
                    total,
                    result,
                )
            for row in range(group * own):
                share = np.float32(0) if total[row] == 0 else np.float32(1) / total[row]
                for column in range(dim):
                    out[head, row // own, start + row % own, column] = narrow(result[row, column] * share, out)
