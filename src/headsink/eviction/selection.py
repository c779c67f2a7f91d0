"""Which keys stay of a text that is over."""

from __future__ import annotations

import torch
from torch import Tensor


def places(scores: Tensor, sink: int, top_k: int, near: range) -> Tensor:
    """Where the keys lie that heads hold of a text that is over: the first `sink`, the `top_k` with the highest scores of
    those between, and the window `near`. scores: [heads, keys]. Returns int64 [heads, places]."""
    between = scores[:, sink : near.start]
    chosen = between.topk(min(top_k, between.shape[1])).indices + sink
    first, last = (
        torch.arange(r.start, r.stop, device=scores.device).expand(len(scores), -1) for r in (range(sink), near)
    )
    return torch.cat([first, chosen, last], 1)
