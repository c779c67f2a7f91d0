"""Attention with its log-sum-exp, by torch's own kernel on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def has_kernel(query: Tensor) -> bool:
    """Whether `attend` can compute attention of these queries."""
    return query.device.type == "cpu" and query.dtype != torch.float16 and not torch.is_grad_enabled()


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool = True) -> tuple[Tensor, Tensor]:
    """Return the attention, in the query's shape, and the log-sum-exp of the logits, without the last axis.

    query: [batch, query heads, tokens, dim]; key, value: [batch, KV heads, keys, dim], where the causal mask takes as many keys
    as tokens.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    # The kernel reads the last axis as contiguous, and does not check it.
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scaling)
    return found[0], found[1]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, pads: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the causal attention of texts and its log-sum-exp, as `attend`.

    pads: tokens of left padding, int [batch], None if there is none; output and log-sum-exp of padding are 0.
    """
    if pads is None:
        return attend(query, key, value, scaling)
    output = torch.zeros_like(query)
    lse = query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for row, first in enumerate(pads.tolist()):
        if first < query.shape[2]:
            own, keys, values = (t[row : row + 1, :, first:] for t in (query, key, value))
            found = attend(own, keys, values, scaling)
            output[row, :, first:], lse[row, :, first:] = found[0][0], found[1][0]
    return output, lse
