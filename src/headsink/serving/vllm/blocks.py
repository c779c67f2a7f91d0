"""Patterns in whole blocks, the unit in which vLLM evicts: never narrower than the pattern, mostly a little wider.

With blocks of B tokens, query i of a KV head with `Blocks(sink=s, back=b)` attends to key j iff

    j <= i  and  ( j // B < s  or  i // B - j // B <= b )

that is, to the first s blocks, its own block, and the b blocks before that. A pattern of sink tokens and a window becomes
s = ceil(sink / B) and b = ceil((window - 1) / B), because the first query of a block looks back the furthest. A query may attend
to up to B - 1 keys beyond the sinks and the window of its pattern, and always to its own block, even if the pattern has no
window. The rule depends on token positions only, not on chunks, so prefix caching, chunked prefill and preemption do not change
the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from headsink.eviction.pattern import Pattern


@dataclass(frozen=True)
class Blocks:
    """The blocks that a KV head keeps: the first `sink`, the current one, and `back` before that. back=None keeps all."""

    sink: int = 0
    back: int | None = None

    def __post_init__(self) -> None:
        if self.back is None and self.sink:
            raise ValueError("sink must be 0 where all blocks are kept (back=None)")

    def cached_tokens(self, tokens: int, block: int) -> int:
        """Return the peak number of blocks of a sequence of up to `tokens` tokens while it is decoded token by token."""
        blocks = -(-tokens // block)
        return blocks if self.back is None else min(blocks, self.sink + self.back + 1)


ALL = Blocks()


def widen(pattern: Pattern, block: int) -> Blocks:
    """Return the fewest blocks that contain every key of a pattern without top-k keys, at every query."""
    if pattern.top_k:
        raise ValueError("the blocks of top-k keys are not known in advance")
    if pattern.window is None:
        return ALL
    return Blocks(-(-pattern.sink // block), -(-(max(pattern.window, 1) - 1) // block))


def union(parts: Iterable[Blocks]) -> Blocks:
    """Return the fewest blocks that contain all blocks of each part."""
    parts = list(parts)
    if any(part.back is None for part in parts):
        return ALL
    return Blocks(max(part.sink for part in parts), max(part.back or 0 for part in parts))


def visible(blocks: Blocks, block: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the mask of the rule above, bool [queries, keys], for int positions [queries] and [keys]."""
    i, j = queries[:, None], keys[None, :]
    if blocks.back is None:
        return j <= i
    return (j <= i) & ((j // block < blocks.sink) | (i // block - j // block <= blocks.back))
