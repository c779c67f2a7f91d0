"""Cached keys and values in 8 bits (attention/int4.py: values in 4 bits).

A row of a cache holds the coordinates of one key or value as int8, and after them one float32 scale: a coordinate is about its
number times the scale. Scale and numbers lie side by side, so that a cache moves, copies and saves rows as they are. vLLM's
`int8_per_token_head` has the same precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127  # rounding is symmetric
SCALE_BYTES = 4


def width(dim: int) -> int:
    """Return the bytes of a row of `dim` coordinates."""
    return dim + SCALE_BYTES


def quantize(numbers: Tensor) -> Tensor:
    """Round keys or values, [..., dim], to int8 [..., dim + 4] by nearest even."""
    wide = numbers.float()
    most = wide.abs().amax(-1, keepdim=True)
    factor = torch.where(most > 0, LARGEST / most, 0)
    scale = (most / LARGEST).flatten().view(torch.int8).view(*most.shape[:-1], SCALE_BYTES)
    return torch.cat([(wide * factor).round().to(torch.int8), scale], -1)


def dequantize(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys or values, [..., dim], of int8 [..., dim + 4]."""
    scale = rows[..., -SCALE_BYTES:].flatten().view(torch.float32)
    return (rows[..., :-SCALE_BYTES] * scale.view(*rows.shape[:-1], 1)).to(dtype)
