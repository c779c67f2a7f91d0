"""The linear scorer: the importance score of a key as a linear function of the cached key and value.

The features are the rotated key, the norms of its rotary pairs, and the value. Each head has its own scorer weights, which are
fitted at calibration (calibration/score_fit.py). Queries far from a key have about the same direction, and the weights learn the
product of the key with that direction. The score is query-agnostic as in KVzip (arXiv 2505.23416), but needs no second forward
pass over the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = float("-inf")  # the score of a key that cannot be a top-k key


def n_features(dim: int) -> int:
    """Return the number of features of a key of `dim` coordinates."""
    return 2 * dim + dim // 2


def key_features(key: Tensor, value: Tensor) -> Tensor:
    """Return the features of keys. key, value: [..., dim]. Returns [..., n_features(dim)], float32 or better."""
    kind = torch.promote_types(key.dtype, torch.float32)
    key, value = key.to(kind), value.to(kind)
    half = key.shape[-1] // 2
    pairs = torch.hypot(key[..., :half], key[..., half : 2 * half])
    return torch.cat([key, pairs, value], -1)


def key_scores(key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """Return the importance scores of keys: [..., heads, keys].

    key, value: [..., heads, keys, dim]; weights: [heads, n_features(dim)]. Not a matrix product, because the rounding of a
    key's score must not depend on the number of other keys.
    """
    features = key_features(key, value)
    return (features * weights.to(features)[:, None]).sum(-1)
