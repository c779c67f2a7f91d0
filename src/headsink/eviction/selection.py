"""The indices that prefill compression keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_indices(scores: Tensor, sink: int, top_k: int, near: range) -> Tensor:
    """Return the kept indices of a complete text: `sink` initial tokens, `top_k` highest-scoring keys, and the window.

    scores: [heads, keys]. near: the indices of the window. Returns int64 [heads, kept indices].
    """
    between = scores[:, sink : near.start]
    chosen = between.topk(min(top_k, between.shape[1])).indices + sink
    first, last = (
        torch.arange(r.start, r.stop, device=scores.device).expand(len(scores), -1) for r in (range(sink), near)
    )
    return torch.cat([first, chosen, last], 1)
