"""The linear scorer: the importance score of a key as a linear function of the cached key and value.

The features are the rotated key, the norms of its rotary pairs, and the value. Queries far from a key have about the same
direction, and the weights learn the product of the key with that direction. The score is query-agnostic as in KVzip (arXiv
2505.23416), but needs no second forward pass over the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headsink.eviction.scorers.scorer import Scorer


class Linear(Scorer):
    """Kernels compute it too: `_score` in attention/cpu/decode.py and attention/cuda/append.py."""

    name = "linear"

    def n_features(self, dim: int) -> int:
        return 2 * dim + dim // 2

    def features(self, key: Tensor, value: Tensor) -> Tensor:
        kind = torch.promote_types(key.dtype, torch.float32)
        key, value = key.to(kind), value.to(kind)
        half = key.shape[-1] // 2
        pairs = torch.hypot(key[..., :half], key[..., half : 2 * half])
        return torch.cat([key, pairs, value], -1)


LINEAR = Linear()
