"""The numbers that CPU kernels read and write: float32, bfloat16 as uint16, and rows of int8 that end with a float32 scale.

numba has no bfloat16 and no exponential that a compiler vectorises. Numbers are passed by address. Their dtype is that of the
array `like`. attention/int8.py says how rows of int8 are rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from headsink.attention.int8 import LARGEST, SCALE_BYTES

FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}  # sums in any order; infinities must work
FLOATS = np.empty(0, np.float32)
_I32, _F32, _I16, _I8 = ir.IntType(32), ir.FloatType(), ir.IntType(16), ir.IntType(8)


@intrinsic
def pointer(context: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer to elements of the dtype of the array `like`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def wide(context: Any, value: Any) -> Any:
    """Convert a float32, a bfloat16 stored as uint16, or an int8 to float32."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        if value == types.int8:
            return builder.sitofp(arguments[0], _F32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(value), generate


@intrinsic
def narrow(context: Any, value: Any, like: Any) -> Any:
    """Convert a float32 to the dtype of the array `like`: float32, or bfloat16 or int8 rounded to nearest even."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like.dtype == types.float32:
            return arguments[0]
        if like.dtype == types.int8:
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


@njit
def row_bytes(columns: Any, like: Any) -> Any:
    """Return the bytes of a row of numbers of the dtype of the array `like`."""
    return columns * like.itemsize + (SCALE_BYTES if like.itemsize == 1 else 0)


@njit
def scale_of(row: Any, like: Any, columns: Any) -> Any:
    """Return the scale of a row at an address, 1 unless it is int8."""
    if like.itemsize == 1:
        return carray(pointer(row + columns, FLOATS), 1)[0]
    return np.float32(1)


@njit(fastmath=FAST)
def encode(numbers: Any, like: Any, row: Any) -> None:
    """Write float32 [dim] to an array, a row of numbers of the dtype of `like`, as attention/int8.py rounds."""
    factor = np.float32(1)
    if like.itemsize == 1:
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
    if like.itemsize == 1:
        scales, width = numbers[-1], row_bytes(columns, like)
        for n in range(count):
            scales[n] = scale_of(rows + n * width, like, columns)
        for row in range(numbers.shape[0] - 1):
            line = numbers[row]
            for n in range(count):
                line[n] *= scales[n]
