"""The numbers that CPU kernels read and write: float32, bfloat16 as uint16, and rows of numbers in 8 or 4 bits with their scales.

numba has no bfloat16 and no exponential that a compiler vectorises. Numbers are passed by address. Their dtype is that of the
array `like`: int8 for rows of attention/int8.py, uint8 for those of attention/int4.py, which say how they are rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from headsink.attention.int4 import FACTOR_BYTES, GROUP, GROUP_BYTES, STEPS
from headsink.attention.int8 import LARGEST, SCALE_BYTES

FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}  # sums in any order; infinities must work
FLOATS, BFLOATS, BYTES = (np.empty(0, kind) for kind in (np.float32, np.uint16, np.uint8))
_I64, _I32, _I16, _I8, _F32 = (*map(ir.IntType, (64, 32, 16, 8)), ir.FloatType())


@intrinsic
def pointer(context: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer to elements of the dtype of the array `like`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def wide(context: Any, value: Any) -> Any:
    """Convert a float32, a bfloat16 stored as uint16, an int8 or a uint8 to float32."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        if value == types.int8:
            return builder.sitofp(arguments[0], _F32)
        if value == types.uint8:
            return builder.uitofp(arguments[0], _F32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(value), generate


@intrinsic
def narrow(context: Any, value: Any, like: Any) -> Any:
    """Convert a float32 to the dtype of the array `like`: float32, or bfloat16, int8 or uint8 rounded to nearest even."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like.dtype == types.float32:
            return arguments[0]
        if like.dtype in (types.int8, types.uint8):
            kind = ir.FunctionType(_F32, [_F32])
            nearest = cgutils.get_or_insert_function(builder.module, kind, "llvm.rint.f32")
            return builder.trunc(builder.fptosi(builder.call(nearest, arguments[:1]), _I32), _I8)
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)

    return like.dtype(types.float32, like), generate


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """Return 2^exponent as float32, for an int32 between -126 and 127."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.int32), generate


@njit(fastmath=FAST)
def exp(x: Any) -> Any:
    """Return e^x with a relative error below 3e-7, x clamped to [-87, 88]. Unlike the mathematics library it is vectorised."""
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


@intrinsic
def bits(context: Any, like: Any) -> Any:
    """Return the bits of a number of a row whose dtype is that of the array `like`: a constant, 4 for uint8."""
    number = 4 if like.dtype == types.uint8 else like.dtype.bitwidth

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_I64, number)

    return types.int64(like), generate


@njit
def row_bytes(columns: Any, like: Any) -> Any:
    """Return the bytes of a row of numbers of the dtype of the array `like`."""
    if bits(like) == 4:
        return columns // GROUP * (GROUP_BYTES + FACTOR_BYTES)
    return columns * like.itemsize + (SCALE_BYTES if bits(like) == 8 else 0)


@njit
def scale_of(row: Any, like: Any, columns: Any) -> Any:
    """Return the scale of a row at an address, 1 unless it is int8."""
    if bits(like) == 8:
        return carray(pointer(row + columns, FLOATS), 1)[0]
    return np.float32(1)


@intrinsic
def _unpack_group(context: Any, codes: Any, scale: Any, zero: Any, out: Any) -> Any:
    """Write a group of numbers in 4 bits at an address to float32 at another, times a scale, plus a zero point.

    numba would compute with 64-bit integers, which processors do not convert to float32 in vectors.
    """
    bytes_, numbers = ir.VectorType(_I8, GROUP_BYTES), ir.VectorType(_F32, GROUP_BYTES)

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at, *factors, written = arguments
        packed = builder.load(builder.inttoptr(at, bytes_.as_pointer()), align=1)
        every = ir.Constant(ir.VectorType(_I32, GROUP_BYTES), [0] * GROUP_BYTES)
        none = ir.Constant(numbers, ir.Undefined)
        own_scale, own_zero = (
            builder.shuffle_vector(builder.insert_element(none, one, ir.Constant(_I32, 0)), none, every)
            for one in factors
        )
        low = builder.and_(packed, ir.Constant(bytes_, [STEPS] * GROUP_BYTES))
        high = builder.lshr(packed, ir.Constant(bytes_, [4] * GROUP_BYTES))
        for half, part in enumerate((low, high)):
            number = builder.uitofp(builder.zext(part, ir.VectorType(_I32, GROUP_BYTES)), numbers)
            product = builder.fmul(number, own_scale, flags=("contract",))
            to = builder.add(written, ir.Constant(_I64, half * GROUP_BYTES * 4))
            value = builder.fadd(product, own_zero, flags=("contract",))
            builder.store(value, builder.inttoptr(to, numbers.as_pointer()), align=4)
        return target.get_dummy_value()

    return types.none(types.int64, types.float32, types.float32, types.int64), generate


@njit(fastmath=FAST)
def unpack(row: Any, columns: Any, out: Any) -> None:
    """Write a row of numbers in 4 bits at an address to float32 [columns]."""
    groups = columns // GROUP
    factors = carray(pointer(row + groups * GROUP_BYTES, BFLOATS), 2 * groups)
    for group in range(groups):
        scale, zero = wide(factors[2 * group]), wide(factors[2 * group + 1])
        _unpack_group(row + group * GROUP_BYTES, scale, zero, out.ctypes.data + group * GROUP * 4)


@njit
def _rounded_up(number: Any) -> Any:
    """Return a float32 as a bfloat16 that is not less, stored as uint16."""
    found = narrow(number, BFLOATS)
    if wide(found) < number:
        found += 1 if number > 0 else -1
    return np.uint16(found)


@njit
def _nearest(number: Any, factor: Any) -> Any:
    """Return the number of 4 bits that is nearest to number x factor."""
    return narrow(min(max(number * factor, np.float32(0)), np.float32(STEPS)), BYTES)


@njit
def _pack(numbers: Any, row: Any) -> None:
    """Write float32 [columns] to a row of numbers in 4 bits at an address."""
    groups = numbers.shape[0] // GROUP
    codes = carray(pointer(row, BYTES), groups * GROUP_BYTES)
    factors = carray(pointer(row + groups * GROUP_BYTES, BFLOATS), 2 * groups)
    for group in range(groups):
        own = numbers[group * GROUP : (group + 1) * GROUP]
        least, most = own[0], own[0]
        for n in range(GROUP):
            least, most = min(least, own[n]), max(most, own[n])
        factors[2 * group + 1] = _rounded_up(-least) ^ np.uint16(0x8000)
        zero = wide(factors[2 * group + 1])
        factors[2 * group] = _rounded_up((most - zero) / np.float32(STEPS))
        scale = wide(factors[2 * group])
        factor = np.float32(1) / scale if scale > 0 else np.float32(0)
        for n in range(GROUP_BYTES):
            low, high = _nearest(own[n] - zero, factor), _nearest(own[n + GROUP_BYTES] - zero, factor)
            codes[group * GROUP_BYTES + n] = low | (high << 4)


@njit(fastmath=FAST)
def encode(numbers: Any, like: Any, row: Any) -> None:
    """Write float32 [dim] to an array, a row of numbers of the dtype of `like`."""
    if bits(like) == 4:
        _pack(numbers, row.ctypes.data)
        return
    factor = np.float32(1)
    if bits(like) == 8:
        most = np.float32(0)
        for n in range(numbers.shape[0]):
            most = max(most, abs(numbers[n]))
        carray(pointer(row.ctypes.data + numbers.shape[0], FLOATS), 1)[0] = most / np.float32(LARGEST)
        factor = np.float32(LARGEST) / most if most > 0 else np.float32(0)
    for n in range(numbers.shape[0]):
        row[n] = narrow(numbers[n] * factor, like)


@njit(fastmath=FAST)
def scale_columns(rows: Any, like: Any, count: Any, columns: Any, numbers: Any) -> None:
    """Multiply column n of float32 numbers[:-1] by the scale of row n, one of `count` at an address, if the rows are int8.

    The last row of `numbers` is scratch.
    """
    if bits(like) == 8:
        scales, width = numbers[-1], row_bytes(columns, like)
        for n in range(count):
            scales[n] = scale_of(rows + n * width, like, columns)
        for row in range(numbers.shape[0] - 1):
            line = numbers[row]
            for n in range(count):
                line[n] *= scales[n]
