"""Cached values in 4 bits.

A row of a cache holds the coordinates of a value as numbers from 0 to 15, two in a byte, and after them a scale and a zero point
in bfloat16 for each group of 32: a coordinate is about its number times the scale, plus the zero point. The zero point is rounded
down and the scale up, so that the numbers cover the group. Byte n of a group holds coordinate n in its low bits and coordinate
n + 16 in its high bits. KIVI (arXiv 2402.02750) quantises values per token too.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 15  # from the least to the largest number
GROUP = 32  # coordinates with one scale and one zero point
GROUP_BYTES = GROUP // 2
FACTOR_BYTES = 4  # a scale and a zero point


def width(dim: int) -> int:
    """Return the bytes of a row of `dim` coordinates, a multiple of 32."""
    return dim // GROUP * (GROUP_BYTES + FACTOR_BYTES)


def quantize(numbers: Tensor) -> Tensor:
    """Round values, [..., dim], to uint8 [..., width(dim)]: to the nearest of 16 numbers, by nearest even."""
    groups = numbers.float().unflatten(-1, (-1, GROUP))
    zero = -_rounded_up(-groups.amin(-1, keepdim=True))
    scale = _rounded_up((groups.amax(-1, keepdim=True) - zero.float()) / STEPS)
    factor = torch.where(scale > 0, 1 / scale.float(), 0)
    codes = ((groups - zero.float()) * factor).round().clamp(0, STEPS).to(torch.uint8)
    packed = codes[..., :GROUP_BYTES] | codes[..., GROUP_BYTES:] << 4
    factors = torch.cat([scale, zero], -1).flatten(-2).contiguous().view(torch.uint8)
    return torch.cat([packed.flatten(-2), factors], -1)


def _rounded_up(numbers: Tensor) -> Tensor:
    """Return float32 numbers as bfloat16 that is not less."""
    bits = numbers.view(torch.int32)
    up = (bits > 0) & (bits & 0xFFFF != 0)  # dropping bits rounds towards 0
    return ((bits >> 16) + up).to(torch.int16).view(torch.bfloat16)


def dequantize(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values, [..., dim], of uint8 [..., width(dim)]."""
    groups = rows.shape[-1] // (GROUP_BYTES + FACTOR_BYTES)
    packed, factors = rows.split([groups * GROUP_BYTES, groups * FACTOR_BYTES], -1)
    packed = packed.unflatten(-1, (groups, GROUP_BYTES))
    codes = torch.cat([packed & STEPS, packed >> 4], -1)
    scale, zero = factors.contiguous().view(torch.bfloat16).float().unflatten(-1, (groups, 2)).split(1, -1)
    return (codes * scale + zero).flatten(-2).to(dtype)
