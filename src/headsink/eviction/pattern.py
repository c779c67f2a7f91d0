"""The definition of a pattern: which keys a query sees. Attention is the softmax over these keys only.

Query i (0-based position in its text) of a KV head with `Pattern(sink=s, top_k=f, window=w)` sees key j iff

    j <= i  and  ( j < s  or  i - j < w  or  j is one of the head's top-k keys at i )

The top-k keys at i are the f keys at s <= j <= i - w with the highest importance scores; all of them if there are fewer than f.
The score is a fixed function of the key and its value (eviction/scorers/linear.py). Therefore an evicted key never returns, the
result does not depend on how the text is divided into chunks, and no query sees more than s + f + w keys. Which of several keys
with equal scores is kept is unspecified.

This module is the slow reference that the cache, the kernels and the serving plugin are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headsink.errors import HeadsinkError

LONGEST = 2**31 - 1  # largest number of tokens in a pattern; kernels use 32-bit counters


@dataclass(frozen=True, slots=True)
class Pattern:
    """The keys that the queries of one KV head may see.

    Parameters
    ----------
    sink : number of initial tokens that are always visible.
    top_k : number of visible keys outside the window, those with the highest importance scores.
    window : number of most recent visible keys, including the query's own; `None` is full attention.

    `Pattern()` is full attention, and `Pattern(4, 0, 128)` is StreamingLLM's (arXiv 2309.17453). `Pattern(4, 0, 0)` sees the sink
    tokens only. `Pattern(0, 0, 0)` sees nothing, and its output is zero.
    """

    sink: int = 0
    top_k: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("sink", "top_k", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise HeadsinkError(f"{name}: {value!r} is not a whole number of tokens, 0 or more")
            if value > LONGEST:
                raise HeadsinkError(f"{name}: {value} tokens are over {LONGEST}, the most that kernels count to")
        if self.window is None and (self.sink or self.top_k):
            raise HeadsinkError("window: full attention (window=None) sees every key, so sink and top_k must be 0")

    @property
    def full(self) -> bool:
        return self.window is None

    def size(self, context: int) -> int:
        """Return the number of cached keys for a text of `context` tokens."""
        return context if self.window is None else min(context, self.sink + self.top_k + self.window)

    def __str__(self) -> str:
        if self.window is None:
            return "full"
        return f"{self.sink}+{self.top_k}k+{self.window}"


FULL = Pattern()


def top_k_keys(pattern: Pattern, queries: Tensor, keys: Tensor, scores: Tensor) -> Tensor:
    """Return which keys are top-k keys at each query: bool [..., queries, keys]. Arguments as for `visible`."""
    i, j = queries[..., :, None], keys[..., None, :]
    candidates = (j >= pattern.sink) & (j <= i - (pattern.window or 0))
    masked = scores[..., None, :].masked_fill(~candidates, float("-inf"))
    rank = masked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return candidates & (rank < pattern.top_k)


def visible(pattern: Pattern, queries: Tensor, keys: Tensor, scores: Tensor) -> Tensor:
    """Return the attention mask of a pattern: bool [..., queries, keys], True where the query sees the key.

    queries: int [..., queries], positions. keys: int [..., keys], ascending positions from the text's first token, negative for
    padding, which no query sees. scores: float [..., keys].
    """
    i, j = queries[..., :, None], keys[..., None, :]
    causal = (j <= i) & (j >= 0)
    if pattern.window is None:
        return causal.expand(*torch.broadcast_shapes(causal.shape[:-2], scores.shape[:-1]), *causal.shape[-2:])
    in_window = i - j < pattern.window
    return causal & ((j < pattern.sink) | in_window | top_k_keys(pattern, queries, keys, scores))


FOREVER = 2**31 - 1  # larger than every column; fits into int32
