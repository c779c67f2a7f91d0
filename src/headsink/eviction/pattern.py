"""The one definition: which keys a query may see under a pattern, and attention with nothing else in the softmax.

Query i (0-based position in its text) of a KV head with `Pattern(sink=s, top_k=f, window=w)` sees key j iff

    j <= i  and  ( j < s  or  i - j < w  or  j is one of the head's top-k keys at i )

The top-k keys at i are the f keys at s <= j <= i - w with the highest scores, all of them while there are not so many. A
key's score is a fixed function of the key and its value (scores.py), so the rule looks backwards only: a key that was once
let go never comes back, one pass, chunks and token by token agree, and no query sees more than s + f + w keys. Which of
several keys with equal scores are kept is left open.

Everything here is slow and obvious. The cache, the kernels and the serving plugin are tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headsink.errors import HeadsinkError

LONGEST = 2**31 - 1  # tokens that a pattern may name: what kernels count with has 32 or 64 bits


@dataclass(frozen=True, slots=True)
class Pattern:
    """The keys that the queries of one KV head may see.

    Parameters
    ----------
    sink : first tokens of the text that stay visible.
    top_k : keys with the highest scores, of those that have left the window, that stay visible.
    window : last keys that are visible, the query's own among them; `None` is full attention.

    `Pattern()` is full attention, `Pattern(4, 0, 128)` is StreamingLLM's shape (arXiv 2309.17453), `Pattern(4, 0, 0)`
    sees the first tokens only and `Pattern(0, 0, 0)` nothing: its output is zero.
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
        """Keys held for a text of `context` tokens."""
        return context if self.window is None else min(context, self.sink + self.top_k + self.window)

    def __str__(self) -> str:
        if self.window is None:
            return "full"
        return f"{self.sink}+{self.top_k}k+{self.window}"


FULL = Pattern()


def top_k_keys(pattern: Pattern, queries: Tensor, keys: Tensor, scores: Tensor) -> Tensor:
    """Which keys are their head's top-k keys at each query: bool [..., queries, keys]. Arguments as for `visible`."""
    i, j = queries[..., :, None], keys[..., None, :]
    gone = (j >= pattern.sink) & (j <= i - (pattern.window or 0))
    worth = scores[..., None, :].masked_fill(~gone, float("-inf"))
    rank = worth.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return gone & (rank < pattern.top_k)


def visible(pattern: Pattern, queries: Tensor, keys: Tensor, scores: Tensor) -> Tensor:
    """The mask of section "definition": bool [..., queries, keys], True where the query sees the key.

    queries: int [..., queries] positions. keys: int [..., keys] positions, ascending from the text's first token,
    negative for padding, which nobody sees. scores: float [..., keys].
    """
    i, j = queries[..., :, None], keys[..., None, :]
    causal = (j <= i) & (j >= 0)
    if pattern.window is None:
        return causal.expand(*torch.broadcast_shapes(causal.shape[:-2], scores.shape[:-1]), *causal.shape[-2:])
    near = i - j < pattern.window
    return causal & ((j < pattern.sink) | near | top_k_keys(pattern, queries, keys, scores))


FOREVER = 2**31 - 1  # a column that never comes, also as int32
