"""What the hardware allows: bandwidth of memory and FLOP/s, as torch reaches them, and the bytes that a decode step reads.

The least time of a decode step is its bytes over the bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

READ = 256 * 2**20  # bytes that the bandwidth is measured with
SIDE = 1024  # of the square matrices that FLOP/s are measured with


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one token reads."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = isinstance(head, nn.Linear) and head.weight is embedding.weight
    unread = {id(embedding.weight)} if not shared else set()
    config, total = model.config.get_text_config(decoder=True), 0.0
    for weight in model.parameters():
        part = 1.0
        if weight.dim() == 3:  # of all experts
            part = _experts_per_token(config) / len(weight)
        total += 0 if id(weight) in unread else part * weight.numel() * weight.element_size()
    return round(total)


def _experts_per_token(config: Any) -> int:
    names = ("num_experts_per_tok", "moe_k", "moe_topk")
    return int(next(value for name in names if isinstance(value := getattr(config, name, None), int)))


def read_bandwidth(device: str | torch.device = "cpu") -> float:
    """Bytes per second that torch reads from memory: the fastest of several sums."""
    buffer = torch.ones(READ // 4, device=device)
    return READ / _fastest(buffer.sum)


def flops(dtype: torch.dtype, device: str | torch.device = "cpu") -> float:
    """Floating-point operations per second of torch's matrix product: the fastest of several."""
    square = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    return 2 * SIDE**3 / _fastest(lambda: square @ square)


def _fastest(work: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of several runs, the first of which warms up."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        if work().is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def limits(device: str | torch.device) -> dict[str, float]:
    """Return what is measured on a device for records: bytes per second, and FLOP/s in float32 and bfloat16."""
    return {
        "read_bytes_per_s": read_bandwidth(device),
        "float32_flops": flops(torch.float32, device),
        "bfloat16_flops": flops(torch.bfloat16, device),
    }
