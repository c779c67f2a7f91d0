"""Causal attention of a whole text with its log-sum-exp, by torch's own kernel on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def has_kernel(query: Tensor) -> bool:
    """Whether `causal_attention` can compute attention of these queries."""
    return query.device.type == "cpu" and query.dtype != torch.float16 and not torch.is_grad_enabled()


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the attention of texts, [batch, query heads, tokens, dim], and the log-sum-exp of the logits, without the last axis.

    query: [batch, query heads, tokens, dim]; key, value: [batch, KV heads, tokens, dim]. pads: tokens of left padding, int
    [batch], None if there is none; output and log-sum-exp of padding are 0.
    """
    output = torch.zeros_like(query)
    lse = query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    group = query.shape[1] // key.shape[1]
    for row, first in enumerate([0] * len(query) if pads is None else pads.tolist()):
        if first == query.shape[2]:
            continue
        own, keys, values = (t[row : row + 1, :, first:] for t in (query, key, value))
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(own, keys, values, 0.0, True, scale=scaling)
        output[row, :, first:], lse[row, :, first:] = found[0][0], found[1][0]
    return output, lse
