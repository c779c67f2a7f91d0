"""Functions shared by the Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(a, b, sum_):
    """Return sum_ + a b in float32, without rounding float32 operands to TF32."""
    if INTERPRETED:  # the interpreter treats bfloat16 as integers; products in float32 are equal
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_, input_precision="ieee")
    if a.dtype == tl.float32:
        return tl.dot(a, b, sum_, input_precision="ieee")
    return tl.dot(a, b, sum_)


@triton.jit
def cap(logits, softcap):
    """Return softcap x tanh(logits / softcap)."""
    return softcap - 2 * softcap / (tl.exp2(logits * (2 * LOG2E / softcap)) + 1)


@triton.jit
def scale_of(row, dim: tl.constexpr):
    """Return the scale of int8 rows that begin at `row` (attention/int8.py)."""
    return tl.load((row + dim).to(tl.pointer_type(tl.float32)))


@triton.jit
def nearest(numbers):
    """Return the nearest whole numbers."""
    return tl.floor(numbers + 0.5)


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 3 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
