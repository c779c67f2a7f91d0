"""The slab: one block table per sequence for all KV heads of all layers, whose pages go to the heads that need them.

Every head of a plan holds up to `capacity` keys: what its pattern keeps, rounded up, and `EVICT_EVERY` more. When a sequence
reaches a multiple of `EVICT_EVERY` tokens and a head is full, the head evicts the `EVICT_EVERY` keys with the lowest importance
scores that are neither sink tokens nor in the window. So a sequence of n tokens holds the same number of keys whatever it says,
and outputs do not depend on chunks, other sequences or preemption.

vLLM's block of one sequence has a page for each head of each layer, a *lane*. The n-th page of a head is any lane of any block:
all pages of all heads are sorted by the length from which they are needed, and dealt to the lanes of the first block, then of the
second, and so on. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from headsink.eviction.pattern import Pattern
from headsink.models.distributed import rank_heads
from headsink.plan.plan import Plan

EVICT_EVERY = 32  # tokens


def capacity(pattern: Pattern, context: int) -> int:
    """Return how many keys a head holds at most: a multiple of `EVICT_EVERY`; that of `context` if nothing is evicted."""
    whole = -(-context // EVICT_EVERY) * EVICT_EVERY
    if pattern.window is None:
        return whole
    kept = pattern.sink + pattern.top_k + pattern.window
    return min(-(-kept // EVICT_EVERY) * EVICT_EVERY + EVICT_EVERY, whole)


def widen(pattern: Pattern, context: int) -> Pattern:
    """Return what a head keeps when it evicts: its pattern, with more top-k keys, or a longer window, as there is room."""
    most = capacity(pattern, context)
    if pattern.window is None or most >= context:
        return Pattern()
    rest = most - EVICT_EVERY - pattern.sink
    if not pattern.top_k:
        return Pattern(pattern.sink, 0, rest)
    return Pattern(pattern.sink, rest - pattern.window, pattern.window)


@dataclass(frozen=True)
class Slab:
    """The pages of a sequence on one rank.

    capacity, sink, window: int64 [layers, KV heads of the rank]. column, lane: int64 [layers, KV heads, pages], where the n-th
    page of a head is: in which block of the sequence, and which of its pages. needs: the number of tokens above which a sequence
    needs each of its blocks, on any rank.
    """

    context: int
    block: int
    capacity: Tensor
    sink: Tensor
    window: Tensor
    column: Tensor
    lane: Tensor
    needs: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, context: int, block: int, ranks: int = 1, rank: int = 0) -> Slab:
        """context: the maximum length of a sequence. block: tokens per block."""
        by_rank = [
            [[heads[head].pattern for head in mine] for heads in plan.layers if heads is not None]
            for mine in rank_heads(plan.model.kv_heads, ranks)
        ]
        needs = [_deal(patterns, context, block)[1] for patterns in by_rank]
        patterns = by_rank[rank]
        places, _ = _deal(patterns, context, block)
        sizes = [[capacity(pattern, context) for pattern in row] for row in patterns]
        kept = [[widen(pattern, context) for pattern in row] for row in patterns]
        pages = max(-(-size // block) for row in sizes for size in row)
        column, lane = torch.zeros(2, len(sizes), len(sizes[0]), pages, dtype=torch.long)
        for (layer, head, page), (at, which) in places.items():
            column[layer, head, page], lane[layer, head, page] = at, which
        return cls(
            context,
            block,
            torch.tensor(sizes),
            torch.tensor([[pattern.sink for pattern in row] for row in kept]),
            torch.tensor([[pattern.window or 0 for pattern in row] for row in kept]),
            column,
            lane,
            tuple(min(of) for of in zip_longest(*needs, fillvalue=context)),
        )

    def __str__(self) -> str:
        share = len(self.needs) / -(-self.context // self.block)
        return f"a sequence of the maximum length takes {len(self.needs)} blocks, {share:.0%} of the full KV cache"

    def held(self, tokens: Tensor) -> Tensor:
        """Return how many keys the heads hold after some tokens, before they evict: [...] -> [layers, KV heads, ...]."""
        most = self.capacity.view(*self.capacity.shape, *[1] * tokens.dim())
        return torch.where(tokens < most, tokens, most - EVICT_EVERY + tokens % EVICT_EVERY)


def blocks_for(needs: Sequence[int], tokens: int) -> int:
    """Return the number of blocks of a sequence. needs: as in `Slab`."""
    return sum(tokens > need for need in needs)


def _deal(
    patterns: Sequence[Sequence[Pattern]], context: int, block: int
) -> tuple[dict[tuple[int, int, int], tuple[int, int]], list[int]]:
    """Return the block and the lane of every page, and the tokens above which every block is needed."""
    lanes = len(patterns) * len(patterns[0])
    pages = sorted(
        (page * block, layer, head, page)
        for layer, row in enumerate(patterns)
        for head, pattern in enumerate(row)
        for page in range(-(-capacity(pattern, context) // block))
    )
    places = {page[1:]: divmod(n, lanes) for n, page in enumerate(pages)}
    return places, [start for start, *_ in pages[::lanes]]
