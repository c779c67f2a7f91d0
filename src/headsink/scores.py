"""The score of a key: how much a head stands to lose with it, by a rule that is linear in what the cache holds of the key.

Features of a key are the key itself, as rotary embedding left it, the norms of the pairs of its coordinates that rotary
embedding turns together, and the value. Weights are a head's own, fitted at calibration (reconstruction.py). Far away from a key
queries come from about the same direction, and the product of the key and that direction is what the weights find; what
is kept does not change with the query, as in KVzip (arXiv 2505.23416), but takes no second reading of the text.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

NONE = float("-inf")  # the score of what is no floating key


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


def lifetimes(held: Tensor, leaving: Tensor, floating: int) -> Tensor:
    """When floating keys are let go, as keys leave the window one after the other: int64 [..., f' + c].

    held: float [..., f'] scores of keys that are floating keys to begin with, -inf where there is none. leaving: float [..., c]
    scores of keys in the order in which they leave, -inf for those that cannot be kept (sink tokens, padding). A key is there
    while fewer than this number of `leaving` have left; those that leave are there from then on, or never.
    """
    every = leaving.shape[-1]
    if held.shape[-1] + every <= floating:  # what can be kept is
        gone = torch.arange(1, every + 1, device=leaving.device)
        return torch.cat([torch.where(held == NONE, 0, every + 1), gone.where(leaving == NONE, every + 1)], -1)
    if leaving.device.type != "cpu" or find_spec("numba") is None:
        return _by_rank(held, leaving, floating)
    before, after = (scores.flatten(0, -2).double().numpy() for scores in (held, leaving))
    ends = np.empty((len(after), before.shape[1] + after.shape[1]), np.int64)
    for row in range(len(ends)):
        _compiled()(before[row], after[row], floating, ends[row])
    return torch.from_numpy(ends).view(*leaving.shape[:-1], -1)


def _by_rank(held: Tensor, leaving: Tensor, floating: int) -> Tensor:
    """`lifetimes`, of all keys at once: a key is there as long as it is among the best `floating` of those so far."""
    every, first = torch.cat([held, leaving], -1), held.shape[-1]
    keys, left = (
        torch.arange(every.shape[-1], device=every.device),
        torch.arange(leaving.shape[-1] + 1, device=every.device),
    )
    order = every.argsort(stable=True).flip(-1)  # of two with one score the later is better
    ranks = torch.empty_like(order).scatter_(-1, order, keys.expand_as(order))
    last = ranks.new_full(
        (*ranks.shape[:-1], len(left)), len(keys)
    )  # the rank of the worst that is there, once so many have left
    begun = max(0, floating - first)  # how many must leave before there are more than `floating`
    if not floating:
        last[:] = -1
    elif begun < len(left):
        last[..., begun:] = prefix_quantiles(ranks, first + left[begun:], floating - 1)
    # The worst rank only falls, so a key is gone when it falls below its own, and never before it comes.
    ends = torch.searchsorted(-last, -ranks, right=True)
    ends = torch.maximum(ends, (keys - first + 1).clamp(min=0))
    return torch.where(every == NONE, (keys - first + 1).clamp(min=0), ends)


def prefix_quantiles(numbers: Tensor, ends: Tensor, n: int) -> Tensor:
    """The n-th smallest, from 0, of the first `ends` numbers of every row.

    numbers: int64 [..., keys], every row 0 to keys - 1 in some order; ends: int64 [prefixes], more than n. Returns int64
    [..., prefixes]. A wavelet matrix (Claude, Navarro and Ordóñez 2015): bit by bit from the highest, numbers whose bit is 0 are moved to
    the front, in order, and each prefix follows those that its answer is among.
    """
    keys, places = numbers.shape[-1], torch.arange(numbers.shape[-1], device=numbers.device)
    low = torch.zeros_like(ends).expand(*numbers.shape[:-1], -1)
    high, rest = ends.expand_as(low), torch.full_like(low, n)
    found = torch.zeros_like(low)
    for bit in reversed(range(max(1, (keys - 1).bit_length()))):
        ones = numbers >> bit & 1
        zeros = torch.nn.functional.pad((1 - ones).cumsum(-1), (1, 0))  # before each place
        all_zeros = zeros[..., -1:]
        from_, to = zeros.gather(-1, low), zeros.gather(-1, high)
        is_one = rest >= to - from_
        found += is_one.long() << bit
        rest = torch.where(is_one, rest - (to - from_), rest)
        low = torch.where(is_one, all_zeros + low - from_, from_)
        high = torch.where(is_one, all_zeros + high - to, to)
        moved = torch.where(ones == 1, all_zeros + places - zeros[..., :-1], zeros[..., :-1])
        numbers = torch.empty_like(numbers).scatter_(-1, moved, numbers)
    return found


def _lifetimes(held: Any, leaving: Any, floating: int, ends: Any) -> None:
    """Of one head: float64 [f'] and [c], written int64 [f' + c]. The floating keys are a heap with the lowest score in front, so
    that each step takes next to nothing."""
    first, heap = len(held), [(held[key], key) for key in range(len(held))]
    heapq.heapify(heap)
    ends[:] = len(leaving) + 1
    while len(heap) and (heap[0][0] == NONE or len(heap) > floating):
        ends[heapq.heappop(heap)[1]] = 0
    for left in range(len(leaving)):
        score, key = leaving[left], first + left
        if score == NONE or floating == 0:
            ends[key] = left + 1
        elif len(heap) < floating:
            heapq.heappush(heap, (score, key))
        else:
            ends[heapq.heappushpop(heap, (score, key))[1]] = left + 1


@cache
def _compiled() -> Callable[..., None]:
    """The same, ten times sooner."""
    from numba import njit

    found: Callable[..., None] = njit(cache=True, nogil=True)(_lifetimes)
    return found


def best(held: Tensor, leaving: Tensor, gone: Tensor, floating: int) -> Tensor:
    """Which keys are floating keys at each of some queries: bool [..., queries, f' + c].

    held, leaving, floating: as for `lifetimes`. gone: int64 [queries], how many of `leaving` have left at each query.
    """
    if held.dim() == 1:
        return best(held[None], leaving[None], gone, floating)[0]
    found = gone[:, None] < lifetimes(held, leaving, floating)[..., None, :]
    found[..., held.shape[-1] :] &= torch.arange(leaving.shape[-1], device=gone.device) < gone[:, None]
    return found
