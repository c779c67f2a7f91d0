"""A pattern in whole blocks, which is what vLLM can keep and let go: never narrower than the pattern, mostly a little wider.

With blocks of B tokens, query i of a KV head with `Blocks(sink=s, back=b)` sees key j iff

    j <= i  and  ( j // B < s  or  i // B - j // B <= b )

that is the first s blocks, its own block, and the b blocks before that. A pattern of first tokens and a window becomes
s = ceil(sink / B), and b = ceil((window - 1) / B): the first query of a block is the one that looks back the furthest.
So a query sees up to B - 1 keys beyond each end of what its pattern says, and at least its own block, even if its
pattern has no window. The rule depends on the places of tokens only, not on how a text is cut into chunks, so prefix
caching, chunked prefill and preemption change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from headsink.eviction.pattern import Pattern


@dataclass(frozen=True)
class Blocks:
    """What a KV head keeps: the first `sink` blocks, the block that is being written and `back` before it; all, if back is
    None."""

    sink: int = 0
    back: int | None = None

    def __post_init__(self) -> None:
        if self.back is None and self.sink:
            raise ValueError("a head that keeps all blocks has no first ones")

    def held(self, tokens: int, block: int) -> int:
        """The most blocks that a text of up to `tokens` tokens holds while it is written token by token."""
        blocks = -(-tokens // block)
        return blocks if self.back is None else min(blocks, self.sink + self.back + 1)


ALL = Blocks()


def widen(pattern: Pattern, block: int) -> Blocks:
    """The fewest blocks that hold, at every query, all that a pattern without top-k keys sees."""
    if pattern.top_k:
        raise ValueError("which blocks hold top-k keys is not known beforehand")
    if pattern.window is None:
        return ALL
    return Blocks(-(-pattern.sink // block), -(-(max(pattern.window, 1) - 1) // block))


def union(parts: Iterable[Blocks]) -> Blocks:
    """The fewest blocks that hold all that each of several would."""
    parts = list(parts)
    if any(part.back is None for part in parts):
        return ALL
    return Blocks(max(part.sink for part in parts), max(part.back or 0 for part in parts))


def visible(blocks: Blocks, block: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys a query sees, by the rule above: bool [queries, keys], from int positions [queries] and [keys]."""
    i, j = queries[:, None], keys[None, :]
    if blocks.back is None:
        return j <= i
    return (j <= i) & ((j // block < blocks.sink) | (i // block - j // block <= blocks.back))
