"""The score of a key: how much a head stands to lose with it, by a rule that is linear in what the cache holds of the key.

Features of a key are the key itself, as rotary embedding left it, the norms of the pairs of its coordinates that rotary
embedding turns together, and the value. Weights are a head's own, fitted at calibration (reconstruction.py). Far away from a key
queries come from about the same direction, and the product of the key and that direction is what the weights find; what
is kept does not change with the query, as in KVzip (arXiv 2505.23416), but takes no second reading of the text.
"""

from __future__ import annotations

import torch
from torch import Tensor


def n_features(dim: int) -> int:
    """Features of a key of a head of size `dim`."""
    return 2 * dim + dim // 2


def key_features(key: Tensor, value: Tensor) -> Tensor:
    """key, value: [..., dim]. Returns [..., n_features(dim)], in float32 or better."""
    kind = torch.promote_types(key.dtype, torch.float32)
    key, value = key.to(kind), value.to(kind)
    half = key.shape[-1] // 2
    pairs = torch.hypot(key[..., :half], key[..., half : 2 * half])
    return torch.cat([key, pairs, value], -1)


def key_scores(key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """key, value: [..., heads, keys, dim]; weights: [heads, n_features(dim)]. Returns [..., heads, keys].

    A sum of products, not a matrix product: the score of a key must not depend on how many it is computed with.
    """
    features = key_features(key, value)
    return (features * weights.to(features)[:, None]).sum(-1)


def places(scores: Tensor, sink: int, floating: int, near: range) -> Tensor:
    """Where the keys lie that heads hold of a text that is over: the first `sink`, the `floating` with the highest scores of
    those between, and the window `near`. scores: [heads, keys]. Returns int64 [heads, places]."""
    between = scores[:, sink : near.start]
    chosen = between.topk(min(floating, between.shape[1])).indices + sink
    first, last = (
        torch.arange(r.start, r.stop, device=scores.device).expand(len(scores), -1) for r in (range(sink), near)
    )
    return torch.cat([first, chosen, last], 1)


def best(held: Tensor, leaving: Tensor, gone: Tensor, floating: int) -> Tensor:
    """Which keys are floating keys at each of some queries.

    held: float [..., f'] scores of keys that left before the first query, -inf where there is none. leaving: float [..., c]
    scores of keys that leave later, in the order in which they leave, -inf for those that cannot be kept (sink tokens, padding).
    gone: int [queries], how many of `leaving` have left at each query. Returns bool [..., queries, f' + c].

    Keys are sorted once. At a query the missing ones, those yet to leave, are gaps in that order: the last place that
    is still good enough lies `floating` places from its start, and one further for every gap before it.
    """
    scores = torch.cat([held, leaving], -1)
    before, keys = held.shape[-1], scores.shape[-1]
    places = torch.arange(keys, device=scores.device)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(-1, order, places.expand_as(order))
    left = torch.arange(keys - before, device=scores.device) < gone[:, None]  # [queries, c]
    gaps, who = place[..., before:].sort(-1)
    missing = ~left.T[who].transpose(-1, -2)  # [..., queries, c], in the order of places
    present_before = gaps[..., None, :] - missing.cumsum(-1) + 1
    last = floating - 1 + (missing & (present_before < floating)).sum(-1, keepdim=True)  # [..., queries, 1]
    place = place.masked_fill(scores == float("-inf"), keys + floating + 1)[..., None, :].int()
    found = place <= last.int()
    found[..., before:] &= left
    return found
