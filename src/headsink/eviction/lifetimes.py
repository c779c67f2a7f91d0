"""The step at which each top-k key is evicted, as keys leave the window one after the other."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headsink.errors import must_be
from headsink.eviction.scorers import NONE
from headsink.utils import device


def lifetimes(cached: Tensor, leaving: Tensor, top_k: int) -> Tensor:
    """Return the step at which each top-k key is evicted, as keys leave the window one after the other: int64 [..., f' + c].

    cached: float [..., f'], scores of the top-k keys at the start, -inf for an empty slot. leaving: float [..., c], scores of the
    keys in the order in which they leave the window, -inf for keys that cannot become top-k keys (sink tokens, padding). A key is
    cached while fewer keys than its step have left the window. A leaving key is a top-k key from its own step on, or never.
    """
    must_be("lifetimes: rows of scores", cached.shape[:-1], leaving.shape[:-1])
    count = leaving.shape[-1]
    if cached.shape[-1] + count <= top_k:  # nothing is evicted
        steps = torch.arange(1, count + 1, device=leaving.device)
        return torch.cat([torch.where(cached == NONE, 0, count + 1), steps.where(leaving == NONE, count + 1)], -1)
    if top_k and device.can_run(leaving):
        return batched_lifetimes(cached, leaving, torch.full(leaving.shape[:-1], top_k, device=leaving.device))[0]
    before, after = (scores.detach().flatten(0, -2).double().cpu().numpy() for scores in (cached, leaving))
    ends = np.empty((len(after), before.shape[1] + after.shape[1]), np.int64)
    run = _compiled() if find_spec("numba") else _lifetimes
    for row in range(len(ends)):
        run(before[row], after[row], top_k, ends[row])
    return torch.from_numpy(ends).to(leaving.device).view(*leaving.shape[:-1], -1)


def batched_lifetimes(cached: Tensor, leaving: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `lifetimes` of all keys in parallel on a GPU. top_k: int64 [...], 1 or more, one number per row.

    Also returns the keys of each row, ordered by descending score: int64 [..., f' + c].
    """
    from headsink.eviction.lifetimes_cuda import better_ones

    scores, first = torch.cat([cached, leaving], -1), cached.shape[-1]
    # step at which they are cached
    start = (torch.arange(scores.shape[-1], device=scores.device) - first + 1).clamp(min=0)
    end, order = (found.view(scores.shape) for found in better_ones(scores.flatten(0, -2), top_k.flatten()))
    end = (end.long() - first).clamp(max=leaving.shape[-1] + 1).maximum(start)
    return torch.where(scores == NONE, start, end), order


def _lifetimes(cached: Any, leaving: Any, top_k: int, ends: Any) -> None:
    """Compute `lifetimes` of one head with a heap of top-k keys, lowest score first: float64 [f'] and [c] into int64 [f' + c]."""
    first, heap = len(cached), [(cached[key], key) for key in range(len(cached))]
    heapq.heapify(heap)
    ends[:] = len(leaving) + 1
    while len(heap) and (heap[0][0] == NONE or len(heap) > top_k):
        ends[heapq.heappop(heap)[1]] = 0
    for left in range(len(leaving)):
        score, key = leaving[left], first + left
        if score == NONE or top_k == 0:
            ends[key] = left + 1
        elif len(heap) < top_k:
            heapq.heappush(heap, (score, key))
        else:
            ends[heapq.heappushpop(heap, (score, key))[1]] = left + 1


@cache
def _compiled() -> Callable[..., None]:
    """Compile `_lifetimes` with numba, which is ten times faster."""
    from numba import njit

    found: Callable[..., None] = njit(cache=True, nogil=True)(_lifetimes)
    return found
