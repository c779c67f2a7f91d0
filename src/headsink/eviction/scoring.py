"""The score of a key: how much a head stands to lose with it, by a rule that is linear in what the cache holds of the key.

Features of a key are the key itself, as rotary embedding left it, the norms of the pairs of its coordinates that rotary
embedding turns together, and the value. Weights are a head's own, fitted at calibration (reconstruction.py). Far away from a key
queries come from about the same direction, and the product of the key and that direction is what the weights find; what
is kept does not change with the query, as in KVzip (arXiv 2505.23416), but takes no second reading of the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = float("-inf")  # the score of what is no top-k key


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
