"""Reference attention: a masked softmax over the keys that a pattern makes visible. Every backend is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headsink.eviction.pattern import Pattern, visible
from headsink.eviction.scorers import LINEAR, Scorer


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: Sequence[Pattern],
    weights: Tensor,
    scaling: float,
    padding: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    scorer: Scorer = LINEAR,
) -> Tensor:
    """Return the attention of a text under one pattern per KV head.

    query: [batch, query heads, keys or fewer, dim], the last queries of the text. key, value: [batch, KV heads, keys, dim].
    weights: scorer weights, [KV heads, features] (eviction/scorers). padding: int [batch], tokens of left padding. softcap,
    sink_logits: as for `masked_attention`. Returns [batch, query heads, queries, dim] in the query's dtype; zero where a query
    sees no key.
    """
    batch, n_keys = key.shape[0], key.shape[2]
    group = query.shape[1] // key.shape[1]
    columns = torch.arange(n_keys, device=key.device)
    offsets = torch.zeros(batch, dtype=torch.long, device=key.device) if padding is None else padding
    positions = columns - offsets[:, None]  # [batch, keys]
    scores = scorer.scores(key, value, weights)  # [batch, KV heads, keys]
    output = torch.zeros_like(query)
    for head, pattern in enumerate(patterns):
        mask = visible(pattern, positions[:, n_keys - query.shape[2] :], positions, scores[:, head])[:, None]
        rows = slice(head * group, (head + 1) * group)
        own = slice(head, head + 1)
        extra = None if sink_logits is None else sink_logits[rows]
        output[:, rows] = masked_attention(query[:, rows], key[:, own], value[:, own], mask, scaling, softcap, extra)
    return output


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return the attention of the queries of one KV head: [batch, query heads, queries, dim].

    query: [batch, query heads, queries, dim]; key, value: [batch, 1, keys, dim]; mask: bool [batch, 1, queries, keys]. softcap:
    logits become softcap x tanh(logits / softcap) (Gemma 2). sink_logits: float [query heads], logits in the softmax without a
    value (gpt-oss).
    """
    logits = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits[:, None, None].to(logits).expand(*logits.shape[:3], 1)], -1)
    shares = logits.softmax(-1).nan_to_num(0.0)  # zero if no key is visible
    return shares[..., : key.shape[2]] @ value
