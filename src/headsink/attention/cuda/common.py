"""What the kernels have in common."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(a, b, sum_):
    """sum_ + a b, summed in float32; float32 numbers are not rounded first."""
    if INTERPRETED:  # it takes bfloat16 for whole numbers; as float32 their products are the same
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_, input_precision="ieee")
    if a.dtype == tl.float32:
        return tl.dot(a, b, sum_, input_precision="ieee")
    return tl.dot(a, b, sum_)


@triton.jit
def capped(logits, softcap):
    """softcap x tanh(logits / softcap)."""
    return softcap - 2 * softcap / (tl.exp2(logits * (2 * LOG2E / softcap)) + 1)


def processors(device: torch.device) -> int:
    """Multiprocessors of a card; few, where the interpreter runs the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
