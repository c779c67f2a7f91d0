"""LLVM building blocks of the prefill kernel: products of four queries with 64 keys, and the online softmax of a tile.

A word is the operand of one of sixteen vector lanes: one float32, or two bfloat16 whose products are added in float32, if the
processor supports it (AVX512-BF16). As in attention/cpu/vectors.py, memory is accessed by address.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # words per vector
KEYS = 64  # keys per tile: with their values they fill half of the L1 cache
ROWS = 4  # queries per product
# Vectors of a row that are summed at once. Without AVX-512 a vector takes two of 16 registers, and more would not fit.
AT_ONCE = 4 if binding.get_host_cpu_features().get("avx512f", False) else 1
PAIRED = bool(binding.get_host_cpu_features().get("avx512bf16", False))

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR, _NUMBERS = (ir.VectorType(kind, LANES) for kind in (_F32, _I32))
_TILE_VECTORS = KEYS // LANES


class _BFloat(ir.Type):
    """LLVM's bfloat16, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _at(builder: Any, base: Any, number: Any, kind: Any) -> Any:
    """Return a pointer `number` words after an address."""
    return builder.inttoptr(builder.add(base, builder.mul(number, ir.Constant(_I64, 4))), kind.as_pointer())


def _load(builder: Any, base: Any, number: Any, kind: Any) -> Any:
    return builder.load(_at(builder, base, number, kind), align=4)


def _broadcast(builder: Any, value: Any) -> Any:
    """Return a vector with `value` in every lane."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_NUMBERS, [0] * LANES))


def _call(builder: Any, name: str, result: Any, *arguments: Any, flags: tuple[str, ...] = ()) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments, fastmath=flags)


def _add_products(builder: Any, total: Any, a: Any, b: Any, paired: bool) -> Any:
    """Return total + a b. a, b: vectors of words as int32, each one float32 or two bfloat16 (`paired`)."""
    if not paired:
        return _call(
            builder,
            f"llvm.fma.v{LANES}f32",
            _VECTOR,
            *(builder.bitcast(x, _VECTOR) for x in (a, b)),
            total,
            flags=("contract",),
        )
    pairs = ir.VectorType(_BFloat(), 2 * LANES)
    return _call(
        builder,
        "llvm.x86.avx512bf16.dpbf16ps.512",
        _VECTOR,
        total,
        *(builder.bitcast(x, pairs) for x in (a, b)),
    )


def _multiply(vectors: int, adds: bool) -> Any:
    """Return a function that multiplies `ROWS` rows of words by a matrix of `vectors` x 16 columns. adds: add to the output."""

    @intrinsic
    def multiply(
        context: Any, rows: Any, length: Any, matrix: Any, apart: Any, count: Any, out: Any, stride: Any, like: Any
    ) -> Any:
        paired = like.dtype != types.float32

        def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            at, row_words, matrix_at, line, number, written, width, _ = arguments

            def offset(row: int, vector: int) -> Any:
                return builder.add(builder.mul(width, ir.Constant(_I64, row)), ir.Constant(_I64, LANES * vector))

            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            for start in range(0, vectors, AT_ONCE):
                chunk = range(start, min(start + AT_ONCE, vectors))
                sums = {key: cgutils.alloca_once(builder, _VECTOR) for key in product(range(ROWS), chunk)}
                for key, total in sums.items():
                    builder.store(_load(builder, written, offset(*key), _VECTOR) if adds else zero, total)
                with cgutils.for_range(builder, number) as loop:
                    begin = builder.mul(line, loop.index)
                    columns = {
                        n: _load(builder, matrix_at, builder.add(begin, ir.Constant(_I64, LANES * n)), _NUMBERS)
                        for n in chunk
                    }
                    for row in range(ROWS):
                        where = builder.add(builder.mul(row_words, ir.Constant(_I64, row)), loop.index)
                        word = _broadcast(builder, _load(builder, at, where, _I32))
                        for n in chunk:
                            found = _add_products(builder, builder.load(sums[row, n]), word, columns[n], paired)
                            builder.store(found, sums[row, n])
                for key, total in sums.items():
                    builder.store(builder.load(total), _at(builder, written, offset(*key), _VECTOR), align=4)
            return target.get_dummy_value()

        return types.none(*[types.int64] * 7, like), generate

    return multiply


products_of_tile = _multiply(_TILE_VECTORS, False)
add_products4, add_products1 = _multiply(4, True), _multiply(1, True)

# Minimax polynomial of 2^x on [-1/2, 1/2], error below 2e-7.
_POWERS = (
    1.0,
    0.693147180559945,
    0.240226509999339,
    0.0555041086648216,
    0.00961833238109,
    0.00133335581464,
    0.000154035303933,
)


def _power(builder: Any, x: Any) -> Any:
    """Return 2^x of a vector, with x clamped to at least -126."""
    least = ir.Constant(_VECTOR, [-126.0] * LANES)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)  # NaN stays NaN
    whole = _call(builder, f"llvm.rint.v{LANES}f32", _VECTOR, x)
    rest = builder.fsub(x, whole)
    value = ir.Constant(_VECTOR, [_POWERS[-1]] * LANES)
    for factor in _POWERS[-2::-1]:
        value = _call(builder, f"llvm.fma.v{LANES}f32", _VECTOR, value, rest, ir.Constant(_VECTOR, [factor] * LANES))
    exponent = builder.shl(builder.fptosi(whole, _NUMBERS), ir.Constant(_NUMBERS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(value, _NUMBERS), exponent), _VECTOR)


@intrinsic
def online_softmax(
    context: Any, logits: Any, columns: Any, until: Any, column: Any, scaling: Any, top: Any, shares: Any, like: Any
) -> Any:
    """One step of the online softmax: the logits of one query and one tile, float32 [KEYS].

    columns, until: int32 [KEYS], the range of query columns that see each key. top: the largest previous logit, float32,
    scaled, in base 2. Output: shares, 2^(logit - new top), as float32 or bfloat16. Returns the new top and the sum of the
    shares.
    """
    narrows = like.dtype != types.float32

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at, first, last, now, factor, most, out, _ = arguments
        low = ir.Constant(_VECTOR, [float("-inf")] * LANES)
        query, scale = _broadcast(builder, builder.trunc(now, _I32)), _broadcast(builder, factor)
        seen, values = [], []
        for n in range(_TILE_VECTORS):
            number = ir.Constant(_I64, LANES * n)
            after_start = builder.icmp_signed("<=", _load(builder, first, number, _NUMBERS), query)
            before_end = builder.icmp_signed(">", _load(builder, last, number, _NUMBERS), query)
            seen.append(builder.and_(after_start, before_end))
            value = builder.fmul(_load(builder, at, number, _VECTOR), scale)
            values.append(builder.select(seen[-1], value, low))
        greatest = values[0]
        for value in values[1:]:
            greatest = builder.select(builder.fcmp_ordered(">", value, greatest), value, greatest)
        new = _call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", _F32, greatest, flags=("nnan",))
        new = builder.select(builder.fcmp_ordered(">", new, most), new, most)
        base = _broadcast(builder, new)
        total = ir.Constant(_VECTOR, [0.0] * LANES)
        for n in range(_TILE_VECTORS):
            share = _power(builder, builder.fsub(values[n], base))
            share = builder.select(seen[n], share, ir.Constant(_VECTOR, [0.0] * LANES))
            total = builder.fadd(total, share)
            if narrows:
                short = builder.fptrunc(share, ir.VectorType(_BFloat(), LANES))
                half = builder.add(out, ir.Constant(_I64, 2 * LANES * n))
                builder.store(short, builder.inttoptr(half, short.type.as_pointer()), align=2)
            else:
                builder.store(share, _at(builder, out, ir.Constant(_I64, LANES * n), _VECTOR), align=4)
        sum_ = _call(
            builder, f"llvm.vector.reduce.fadd.v{LANES}f32", _F32, ir.Constant(_F32, 0.0), total, flags=("reassoc",)
        )
        return cgutils.pack_array(builder, [new, sum_])

    kinds = [types.int64] * 4 + [types.float32] * 2 + [types.int64, like]
    return types.UniTuple(types.float32, 2)(*kinds), generate


@intrinsic
def fetch(context: Any, address: Any) -> Any:
    """Prefetch the cache line at an address."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [byte.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [byte, *(ir.Constant(_I32, n) for n in (0, 3, 1))])  # read, high locality, data
        return target.get_dummy_value()

    return types.none(types.int64), generate


@intrinsic
def to_columns(context: Any, keys: Any, taken: Any, row: Any, out: Any, like: Any, work: Any) -> Any:
    """Transpose sixteen words of each of the sixteen keys `taken` (int32) into columns: [16, KEYS].

    keys: address of the first of these words of key 0. row: bytes per key.
    """
    widens = like.dtype != work.dtype

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, numbers, apart, written, _, _ = arguments
        lines = []
        for n in range(LANES):
            key = builder.sext(_load(builder, numbers, ir.Constant(_I64, n), _I32), _I64)
            at = builder.add(first, builder.mul(key, apart))
            if widens:
                short = builder.load(builder.inttoptr(at, ir.VectorType(_I16, LANES).as_pointer()), align=2)
                line = builder.shl(builder.zext(short, _NUMBERS), ir.Constant(_NUMBERS, [16] * LANES))
            else:
                line = builder.load(builder.inttoptr(at, _NUMBERS.as_pointer()), align=2)
            lines.append(line)
        for step in (1, 2, 4, 8):  # swap the off-diagonal blocks of every block of 2 x step lines and lanes
            upper = [n if not n & step else LANES + n - step for n in range(LANES)]
            lower = [n + step if not n & step else LANES + n for n in range(LANES)]
            for n in range(LANES):
                if not n & step:
                    pair = lines[n], lines[n + step]
                    lines[n], lines[n + step] = (
                        builder.shuffle_vector(*pair, ir.Constant(_NUMBERS, order)) for order in (upper, lower)
                    )
        for n, line in enumerate(lines):
            builder.store(line, _at(builder, written, ir.Constant(_I64, KEYS * n), _NUMBERS), align=4)
        return target.get_dummy_value()

    return types.none(*[types.int64] * 4, like, work), generate
