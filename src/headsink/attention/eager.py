"""Attention of grouped queries in plain torch: what every kernel backend falls back to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headsink.attention.params import AttentionParams, shares


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    softmax: AttentionParams,
    rotated: Tensor | None = None,
    sink: int = 0,
) -> Tensor:
    """Attend in torch from grouped queries, each over the keys of its KV head.

    query: [batch, heads x group, tokens, dim]; keys, values: [batch, heads, keys, dim]; mask: bool [batch, heads, tokens, keys],
    or [1, 1, tokens, keys] where `softmax` is not plain, or None. rotated: the queries for the first `sink` keys, if they differ.
    Returns zero where a query sees no key.
    """
    batch, heads, n_keys, dim = keys.shape
    if n_keys == 0:
        return torch.zeros_like(query)
    if rotated is not None or not softmax.plain:
        return _attend_by_logits(query, keys, values, mask, softmax, rotated, sink)
    tokens, group = query.shape[2], query.shape[1] // heads
    if tokens == 1:  # the heads of a group as queries, so a key is read once
        rows = query.reshape(batch, heads, group, dim)
        mask = None if mask is None else mask.expand(batch, heads, group, n_keys)
    else:  # the heads of a group share a mask
        rows = query.reshape(batch * heads, group, tokens, dim)
        keys, values = (t.reshape(batch * heads, 1, n_keys, dim).expand(-1, group, -1, -1) for t in (keys, values))
        mask = None if mask is None else mask.reshape(batch * heads, 1, tokens, n_keys)
    output = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=softmax.scaling)
    return output.view(batch, heads * group, tokens, dim)


def _attend_by_logits(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    softmax: AttentionParams,
    rotated: Tensor | None,
    sink: int,
) -> Tensor:
    """Compute what `sdpa` cannot express, with all logits in memory, in float32 or better."""
    batch, heads, n_keys, _ = keys.shape
    kind = torch.promote_types(query.dtype, torch.float32)

    def logits(of: Tensor, seen: Tensor) -> Tensor:
        rows = of.to(kind).reshape(batch, heads, -1, of.shape[3]) * softmax.scaling
        return rows @ seen.to(kind).transpose(-1, -2)

    scores = logits(query, keys)
    if rotated is not None:
        scores[..., :sink] = logits(rotated, keys[:, :, :sink])
    scores = softmax.capped(scores).view(batch, heads, -1, query.shape[2], n_keys)
    if mask is not None:
        scores = scores.masked_fill_(~mask[:, :, None], float("-inf"))
    sink_logits = None if softmax.sink_logits is None else softmax.sink_logits.view(heads, -1, 1, 1)
    weights = shares(scores, sink_logits).nan_to_num(0.0).flatten(2, 3)  # zero if no key is visible
    return (weights.to(values.dtype) @ values).view_as(query)
