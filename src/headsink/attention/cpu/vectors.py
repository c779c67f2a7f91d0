"""Vectorised sums of products for the CPU kernels, in LLVM code for any processor, with several sums in registers.

numba does not let the caller choose vector instructions. Matrices and vectors are passed by address. The numbers of a matrix have
the dtype of the array `like` (attention/cpu/elements.py); the scale at the end of a row of int8 is left out of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from headsink.attention.cpu.elements import FAST, FLOATS, pointer, row_bytes, wide
from headsink.attention.cpu.memory import AHEAD, fetch
from headsink.attention.int8 import SCALE_BYTES

_I32, _F32, _I16, _I8 = ir.IntType(32), ir.FloatType(), ir.IntType(16), ir.IntType(8)
# Numbers per vector: as many as a register holds, so that twelve sums, keys and queries stay in 16 registers.
LANES = 16 if binding.get_host_cpu_features().get("avx512f", False) else 8
IN_ORDER = 2 * LANES  # where one row is read at a time, so that enough sums are independent
_I64 = ir.IntType(64)


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)


def _lanes(builder: Any, address: Any, size: int, lanes: int = LANES) -> Any:
    """Load a vector of numbers of `size` bytes as float32."""
    vector, wide = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)
    if size == 4:
        return builder.load(builder.inttoptr(address, vector.as_pointer()), align=4)
    kind = ir.VectorType(_I16 if size == 2 else _I8, lanes)
    short = builder.load(builder.inttoptr(address, kind.as_pointer()), align=size)
    if size == 1:
        return builder.sitofp(builder.sext(short, wide), vector)
    return builder.bitcast(builder.shl(builder.zext(short, wide), ir.Constant(wide, [16] * lanes)), vector)


def _size(like: Any) -> int:
    """Bytes of a number of the dtype of an array type."""
    return int(like.dtype.bitwidth) // 8


def _row(builder: Any, columns: Any, size: int) -> Any:
    """The bytes of a row."""
    own = builder.mul(columns, _number(size))
    return own if size > 1 else builder.add(own, _number(SCALE_BYTES))


def _add_product(builder: Any, a: Any, b: Any, total: Any) -> None:
    """Compute total += a b, where `total` is on the stack; the compiler turns it into a register."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(product, builder.load(total), flags=("contract",)), total)


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _pairs_added(builder: Any, a: Any, b: Any) -> Any:
    """Return for every four lanes the sums of two pairs of `a`, then of `b`: one instruction on many processors."""
    count = a.type.count
    even = [n + base for first in range(0, count, 4) for base in (0, count) for n in (first, first + 2)]
    return builder.fadd(*(_shuffled(builder, a, b, lanes) for lanes in (even, [lane + 1 for lane in even])))


def _four_sums(builder: Any, vectors: list[Any]) -> Any:
    """Return the sums of the lanes of four vectors, a vector of four."""
    first, second = (_pairs_added(builder, *vectors[n : n + 2]) for n in (0, 2))
    found = _pairs_added(builder, first, second)
    while found.type.count > 4:
        half = found.type.count // 2
        found = builder.fadd(*(_shuffled(builder, found, found, list(range(n, n + half))) for n in (0, half)))
    return found


def _dots(rows: int, lines: int = 4, lanes: int = LANES) -> Callable[..., None]:
    """Return a function for the products of `lines` rows of a matrix with `rows` vectors, over whole vectors of `lanes`.

    lines: 4 or 1. Numbers are added in an order that depends on `lanes` only.
    """
    kind = ir.VectorType(_F32, lanes)

    @intrinsic
    def products(context: Any, matrix: Any, like: Any, columns: Any, vectors: Any, out: Any, stride: Any) -> Any:
        size = _size(like)

        def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            at, _, length, given, written, apart = arguments
            widths = {at: _row(builder, length, size), given: _row(builder, length, 4)}
            zero = ir.Constant(kind, [0.0] * lanes)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(lines)] for _ in range(rows)]
            for total in chain.from_iterable(sums):  # allocated once, zeroed at every call
                builder.store(zero, total)
            with cgutils.for_range(builder, builder.udiv(length, _number(lanes))) as loop:
                first = builder.mul(loop.index, _number(lanes))

                def offset(base: Any, row: int, size: int) -> Any:
                    begin = builder.add(base, builder.mul(widths[base], _number(row)))
                    return builder.add(begin, builder.mul(first, _number(size)))

                loaded = [_lanes(builder, offset(at, row, size), size, lanes) for row in range(lines)]
                for row in range(rows):
                    vector = _lanes(builder, offset(given, row, 4), 4, lanes)
                    for n in range(lines):
                        _add_product(builder, loaded[n], vector, sums[row][n])
            totals = [[builder.load(total) for total in own] for own in sums]
            if lines == 4:
                found = [_four_sums(builder, own) for own in totals]
            else:
                together = _four_sums(builder, [totals[min(row, rows - 1)][0] for row in range(4)])
                found = [builder.extract_element(together, ir.Constant(_I32, row)) for row in range(rows)]
            for row, one in enumerate(found):
                where = builder.add(written, builder.mul(builder.mul(apart, _number(row)), _number(4)))
                builder.store(one, builder.inttoptr(where, one.type.as_pointer()), align=4)
            return target.get_dummy_value()

        return types.none(types.int64, like, types.int64, types.int64, types.int64, types.int64), generate

    return products  # type: ignore[no-any-return]


def _weighted_sums(rows: int, chunks: int) -> Callable[..., None]:
    """Return a function that adds weighted rows of a matrix, in `chunks` vectors, to `rows` sums."""
    kind = ir.VectorType(_F32, LANES)

    @intrinsic
    def weighted(
        context: Any, matrix: Any, like: Any, columns: Any, weights: Any, stride: Any, count: Any, out: Any
    ) -> Any:
        size = _size(like)

        def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            at, _, length, given, apart, number, written = arguments
            width = _row(builder, length, size)

            def offset(row: int, chunk: int) -> Any:
                column = builder.add(builder.mul(length, _number(row)), _number(LANES * chunk))
                return builder.add(written, builder.mul(column, _number(4)))

            sums = [[cgutils.alloca_once(builder, kind) for _ in range(chunks)] for _ in range(rows)]
            for row in range(rows):
                for chunk in range(chunks):
                    builder.store(_lanes(builder, offset(row, chunk), 4), sums[row][chunk])
            with cgutils.for_range(builder, number) as loop:
                begin = builder.add(at, builder.mul(loop.index, width))
                loaded = [_lanes(builder, builder.add(begin, _number(LANES * size * n)), size) for n in range(chunks)]
                for row in range(rows):
                    which = builder.add(builder.mul(apart, _number(row)), loop.index)
                    where = builder.add(given, builder.mul(which, _number(4)))
                    weight = builder.load(builder.inttoptr(where, _F32.as_pointer()), align=4)
                    empty = ir.Constant(kind, ir.Undefined)
                    one = builder.insert_element(empty, weight, ir.Constant(_I32, 0))
                    same = _shuffled(builder, one, empty, [0] * LANES)
                    for chunk in range(chunks):
                        _add_product(builder, loaded[chunk], same, sums[row][chunk])
            for row in range(rows):
                for chunk in range(chunks):
                    pointer = builder.inttoptr(offset(row, chunk), kind.as_pointer())
                    builder.store(builder.load(sums[row][chunk]), pointer, align=4)
            return target.get_dummy_value()

        kinds = types.int64, like, types.int64, types.int64, types.int64, types.int64, types.int64
        return types.none(*kinds), generate

    return weighted  # type: ignore[no-any-return]


_dots1, _dots2, _dots3, _dots4 = (_dots(rows) for rows in (1, 2, 3, 4))
_dot1 = _dots(1, 1)
_line1, _line2, _line3, _line4 = (_dots(rows, 1, IN_ORDER) for rows in (1, 2, 3, 4))
_wide1, _wide2, _wide3, _wide4 = (_weighted_sums(rows, 4) for rows in (1, 2, 3, 4))
_thin1, _thin2, _thin3, _thin4 = (_weighted_sums(rows, 1) for rows in (1, 2, 3, 4))


@intrinsic
def _largest(context: Any, numbers: Any, count: Any) -> Any:
    """Return the largest of float32 numbers at an address, whole vectors of them; minus infinity if there is none."""
    kind, flags = ir.VectorType(_F32, LANES), ("nnan",)

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        top = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(kind, [float("-inf")] * LANES), top)
        with cgutils.for_range(builder, builder.udiv(arguments[1], _number(LANES))) as loop:
            at = builder.add(arguments[0], builder.mul(loop.index, _number(4 * LANES)))
            found, most = _lanes(builder, at, 4), builder.load(top)
            more = builder.fcmp_ordered(">", found, most, flags=flags)
            builder.store(builder.select(more, found, most), top)
        reduce = ir.FunctionType(_F32, [kind])
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, reduce, name), [builder.load(top)], fastmath=flags
        )

    return types.float32(types.int64, types.int64), generate


@njit
def largest(numbers: Any, count: Any) -> Any:
    """Return the largest of `count` float32 numbers at an address, one or more."""
    most, all_numbers = _largest(numbers, count), carray(pointer(numbers, FLOATS), count)
    for n in range(count // LANES * LANES, count):
        most = max(most, all_numbers[n])
    return most


@njit(fastmath=FAST)
def _dot(matrix: Any, like: Any, columns: Any, vector: Any, begin: Any) -> Any:
    """Return the product of a row of a matrix with a vector, from column `begin` on."""
    row, given = carray(pointer(matrix, like), columns), carray(pointer(vector, FLOATS), columns)
    total = np.float32(0)
    for n in range(begin, columns):
        total += wide(row[n]) * given[n]
    return total


@njit(fastmath=FAST)
def products(matrix: Any, like: Any, count: Any, columns: Any, vectors: Any, rows: Any, out: Any, stride: Any) -> None:
    """Compute the products of `count` rows of a matrix, `columns` long, with `rows` contiguous vectors of float32.

    Output: float32 out[r x stride + n] for vector r and row n of the matrix, which does not depend on `count` and `rows`.
    """
    width, whole = row_bytes(columns, like), columns // LANES * LANES
    first = 0
    while first < count and count >= 4:
        at = min(first, count - 4)  # the last four rows may overlap the previous ones
        row = 0
        while row < rows:
            four, given, to = matrix + at * width, vectors + row * columns * 4, out + (row * stride + at) * 4
            if rows - row >= 4:
                _dots4(four, like, columns, given, to, stride)
            elif rows - row == 3:
                _dots3(four, like, columns, given, to, stride)
            elif rows - row == 2:
                _dots2(four, like, columns, given, to, stride)
            else:
                _dots1(four, like, columns, given, to, stride)
            row += 4
        first += 4
    while first < count:
        for row in range(rows):
            line, given, to = matrix + first * width, vectors + row * columns * 4, out + (row * stride + first) * 4
            _dot1(line, like, columns, given, to, stride)
        first += 1
    if whole < columns:
        written = carray(pointer(out, FLOATS), rows * stride)
        for row in range(rows):
            for n in range(count):
                written[row * stride + n] += _dot(matrix + n * width, like, columns, vectors + row * columns * 4, whole)


@njit(fastmath=FAST)
def products_in_order(
    matrix: Any, like: Any, count: Any, columns: Any, vectors: Any, rows: Any, out: Any, stride: Any
) -> None:
    """Compute `products` one row of the matrix at a time, in the order of memory. They do not depend on `rows`."""
    width, whole = columns * like.itemsize, columns // IN_ORDER * IN_ORDER
    written = carray(pointer(out, FLOATS), rows * stride)
    for n in range(count):
        line = matrix + n * width
        fetch(line + AHEAD, width)
        for row in range(0, rows, 4):
            given, to = vectors + row * columns * 4, out + (row * stride + n) * 4
            if rows - row >= 4:
                _line4(line, like, columns, given, to, stride)
            elif rows - row == 3:
                _line3(line, like, columns, given, to, stride)
            elif rows - row == 2:
                _line2(line, like, columns, given, to, stride)
            else:
                _line1(line, like, columns, given, to, stride)
        if whole < columns:
            for row in range(rows):
                written[row * stride + n] += _dot(line, like, columns, vectors + row * columns * 4, whole)


@njit(fastmath=FAST)
def add_weighted_sum(
    matrix: Any, like: Any, count: Any, columns: Any, weights: Any, rows: Any, stride: Any, out: Any
) -> None:
    """Add to out[r] the sum of `count` rows of a matrix, `columns` long, row n times float32 weights[r x stride + n]."""
    size, row = like.itemsize, 0
    while row < rows:
        given, left, column = weights + row * stride * 4, rows - row, 0
        while column + LANES <= columns:
            at, to = matrix + column * size, out + (row * columns + column) * 4
            if column + 4 * LANES <= columns:
                if left >= 4:
                    _wide4(at, like, columns, given, stride, count, to)
                elif left == 3:
                    _wide3(at, like, columns, given, stride, count, to)
                elif left == 2:
                    _wide2(at, like, columns, given, stride, count, to)
                else:
                    _wide1(at, like, columns, given, stride, count, to)
                column += 4 * LANES
            else:
                if left >= 4:
                    _thin4(at, like, columns, given, stride, count, to)
                elif left == 3:
                    _thin3(at, like, columns, given, stride, count, to)
                elif left == 2:
                    _thin2(at, like, columns, given, stride, count, to)
                else:
                    _thin1(at, like, columns, given, stride, count, to)
                column += LANES
        row += 4
    whole = columns // LANES * LANES
    if whole < columns:
        matrix_rows = carray(pointer(matrix, like), (count, row_bytes(columns, like) // size))
        shares = carray(pointer(weights, FLOATS), (rows, stride))
        written = carray(pointer(out, FLOATS), (rows, columns))
        for one in range(rows):
            for n in range(count):
                for column in range(whole, columns):
                    written[one, column] += shares[one, n] * wide(matrix_rows[n, column])
