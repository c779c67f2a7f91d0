"""When a top-k key is evicted: for every key of a text, the column from which no query sees it."""

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
from headsink.eviction.scoring import NONE
from headsink.utils import device


def lifetimes(held: Tensor, leaving: Tensor, top_k: int) -> Tensor:
    """When top-k keys are let go, as keys leave the window one after the other: int64 [..., f' + c].

    held: float [..., f'] scores of keys that are top-k keys to begin with, -inf where there is none. leaving: float [..., c]
    scores of keys in the order in which they leave, -inf for those that cannot be kept (sink tokens, padding). A key is there
    while fewer than this number of `leaving` have left; those that leave are there from then on, or never.
    """
    must_be("lifetimes: rows of scores", held.shape[:-1], leaving.shape[:-1])
    every = leaving.shape[-1]
    if held.shape[-1] + every <= top_k:  # what can be kept is
        gone = torch.arange(1, every + 1, device=leaving.device)
        return torch.cat([torch.where(held == NONE, 0, every + 1), gone.where(leaving == NONE, every + 1)], -1)
    if top_k and device.can_run(leaving):
        return at_once(held, leaving, torch.full(leaving.shape[:-1], top_k, device=leaving.device))[0]
    before, after = (scores.detach().flatten(0, -2).double().cpu().numpy() for scores in (held, leaving))
    ends = np.empty((len(after), before.shape[1] + after.shape[1]), np.int64)
    one = compiled() if find_spec("numba") else _lifetimes
    for row in range(len(ends)):
        one(before[row], after[row], top_k, ends[row])
    return torch.from_numpy(ends).to(leaving.device).view(*leaving.shape[:-1], -1)


def at_once(held: Tensor, leaving: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """The same of all keys at once, on a GPU, with a number of top-k keys for each row: int64 [...], 1 or more.

    Returns as well the keys of each row, the best first: int64 [..., f' + c].
    """
    from headsink.eviction.lifetimes_cuda import better_ones

    every, first = torch.cat([held, leaving], -1), held.shape[-1]
    comes = (torch.arange(every.shape[-1], device=every.device) - first + 1).clamp(min=0)  # when they are there
    goes, best = (found.view(every.shape) for found in better_ones(every.flatten(0, -2), top_k.flatten()))
    goes = (goes.long() - first).clamp(max=leaving.shape[-1] + 1).maximum(comes)
    return torch.where(every == NONE, comes, goes), best


def _lifetimes(held: Any, leaving: Any, top_k: int, ends: Any) -> None:
    """Of one head: float64 [f'] and [c], written int64 [f' + c]. The top-k keys are a heap with the lowest score in front, so
    that each step takes next to nothing."""
    first, heap = len(held), [(held[key], key) for key in range(len(held))]
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
def compiled() -> Callable[..., None]:
    """The same, ten times sooner."""
    from numba import njit

    found: Callable[..., None] = njit(cache=True, nogil=True)(_lifetimes)
    return found


def best(held: Tensor, leaving: Tensor, gone: Tensor, top_k: int) -> Tensor:
    """Which keys are top-k keys at each of some queries: bool [..., queries, f' + c].

    held, leaving, top_k: as for `lifetimes`. gone: int64 [queries], how many of `leaving` have left at each query.
    """
    if held.dim() == 1:
        return best(held[None], leaving[None], gone, top_k)[0]
    found = gone[:, None] < lifetimes(held, leaving, top_k)[..., None, :]
    found[..., held.shape[-1] :] &= torch.arange(leaving.shape[-1], device=gone.device) < gone[:, None]
    return found
