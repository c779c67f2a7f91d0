"""Attention of grouped queries over keys that lie ready, in plain torch: the queries of a KV head are rows of one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_rows(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of grouped queries, each over the keys of its KV head.

    query: [batch, heads x group, tokens, dim]; keys, values: [batch, heads, keys, dim]; mask: bool [batch, heads, tokens,
    keys] or None. Zero where a query sees no key.
    """
    batch, heads, n_keys, dim = keys.shape
    if n_keys == 0:
        return torch.zeros_like(query)
    tokens, group = query.shape[2], query.shape[1] // heads
    if tokens == 1:  # the rows of a group as queries: a key is read once
        rows = query.reshape(batch, heads, group, dim)
        mask = None if mask is None else mask.expand(batch, heads, group, n_keys)
    else:  # the heads of a group share a mask, which is made once
        rows = query.reshape(batch * heads, group, tokens, dim)
        keys, values = (t.reshape(batch * heads, 1, n_keys, dim).expand(-1, group, -1, -1) for t in (keys, values))
        mask = None if mask is None else mask.reshape(batch * heads, 1, tokens, n_keys)
    output = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    return output.view(batch, heads * group, tokens, dim)


def attend_turned(
    query: Tensor, turned: Tensor, sink: int, keys: Tensor, values: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """As `attend_rows`, where the first `sink` keys are looked at with other queries."""
    batch, heads = keys.shape[:2]

    def logits(of: Tensor, seen: Tensor) -> Tensor:
        rows = of.to(turned.dtype).reshape(batch, heads, -1, of.shape[3])
        return rows @ seen.to(turned.dtype).transpose(-1, -2) * scaling

    every = logits(query, keys)
    every[..., :sink] = logits(turned, keys[:, :, :sink])
    every = every.unflatten(2, (-1, query.shape[2])).masked_fill_(~mask[:, :, None], float("-inf"))
    shares = every.softmax(-1).nan_to_num(0.0).flatten(2, 3)  # no key at all: zero
    return (shares.to(values.dtype) @ values).view_as(query)
