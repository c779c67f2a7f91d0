"""The least time that a decode step can take on a CPU: the bytes that it reads over the bandwidth of memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

READ = 256 * 2**20  # bytes that the bandwidth is measured with


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


def read_bandwidth() -> float:
    """Bytes per second that torch reads from memory: the fastest of several sums."""
    buffer, times = torch.ones(READ // 4), []
    for _ in range(8):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return READ / min(times)
