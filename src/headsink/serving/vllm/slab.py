"""The slab: one block table per sequence for all KV heads of all layers, whose pages go to the heads that need them.

Every head of a plan holds up to `capacity` keys: what it keeps, which is its pattern, rounded up, and `EVICT_EVERY` more. A
prompt is read in full attention, and at its end every head evicts down to what it keeps. Then a head evicts down to it after
every `EVICT_EVERY` tokens. With sparse prefill a prompt is read like later tokens. So the number of keys of a sequence depends on
its length and that of its prompt alone, and outputs do not depend on chunks, other sequences or preemption.

vLLM's block of one sequence has a page for each head of each layer, a *lane*. The n-th page of a head is any lane of any block:
all pages of all heads are sorted by the length from which they are needed, and dealt to the lanes of the first block, then of the
second, and so on.

A sequence may start from a prefix (prefixes.py), which counts as its prompt; the rest of its prompt is read like later tokens.

The blocks of a sequence are, in this order: those that it needs at the end of its prompt; blocks for the prompt while it is read,
in which all heads have all keys; and those that it needs later. The second kind is for earlier chunks of the prompt only, and is
free again once the prompt is read. Nothing here imports vLLM.
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
ALL = 2**30  # more keys than any context


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

    keeps: how many keys every head keeps, `ALL` if it never evicts; sink, window: int64 [layers, KV heads of the rank]. column,
    lane: int64 [layers, KV heads, pages], where the n-th page of a head is: in which block of the sequence, and which of its
    pages. needs: the number of tokens above which a sequence needs each of its blocks, on any rank.
    """

    context: int
    block: int
    keeps: Tensor
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
        dealt = [_deal(patterns, context, block) for patterns in by_rank]
        patterns, places = by_rank[rank], dealt[rank][0]
        sizes = [[capacity(pattern, context) for pattern in row] for row in patterns]
        kept = [[widen(pattern, context) for pattern in row] for row in patterns]
        pages = max(-(-size // block) for row in sizes for size in row)
        column, lane = torch.zeros(2, len(sizes), len(sizes[0]), pages, dtype=torch.long)
        for (layer, head, page), (at, which) in places.items():
            column[layer, head, page], lane[layer, head, page] = at, which
        return cls(
            context,
            block,
            torch.tensor([[pattern.size(ALL) for pattern in row] for row in kept]),
            torch.tensor([[pattern.sink for pattern in row] for row in kept]),
            torch.tensor([[pattern.window or 0 for pattern in row] for row in kept]),
            column,
            lane,
            tuple(min(of) for of in zip_longest(*(needs for _, needs in dealt), fillvalue=context)),
        )

    def __str__(self) -> str:
        share = len(self.needs) / -(-self.context // self.block)
        return f"a sequence of the maximum length takes {len(self.needs)} blocks, {share:.0%} of the full KV cache"

    def held(self, tokens: Tensor, prompt: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many keys the heads hold after some tokens, and how many they evict before the next one.

        tokens: int64 [sequences], at least `prompt`, the tokens that were read in full attention, or come from a prefix.
        missing: int64 [layers, KV heads, sequences], tokens of the prefix that a head does not hold. Returns int64 [layers, KV
        heads, sequences], twice.
        """
        keeps = self.keeps[..., None]
        last = tokens - 1 - (tokens - 1 - prompt) % EVICT_EVERY  # where heads evicted before
        kept = torch.minimum(tokens - missing, keeps)
        held = torch.where(tokens > prompt, torch.minimum(last - missing, keeps) + tokens - last, kept)
        evicts = (tokens - prompt) % EVICT_EVERY == 0
        return held, torch.where(evicts, held - kept, 0)

    def next_eviction(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Return the length at which a head of a sequence evicts next, int64 [sequences]; or an earlier one."""
        least = int(self.keeps.min()) + 1
        beyond = torch.maximum(tokens + 1, torch.tensor(least)) - prompt
        return prompt + -(-beyond // EVICT_EVERY) * EVICT_EVERY


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
