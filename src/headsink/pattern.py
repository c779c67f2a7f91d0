"""The one definition: which keys a query may see under a pattern, and attention with nothing else in the softmax.

Query i (0-based position in its text) of a KV head with `Pattern(sink=s, floating=f, window=w)` sees key j iff

    j <= i  and  ( j < s  or  i - j < w  or  j is one of the head's floating sinks at i )

The floating sinks at i are the last f keys at s <= j <= i - w whose value is short: its norm lies below a threshold fixed at
calibration. There are fewer while not so many short keys have left the window. The rule looks backwards only, so one
pass, chunks and token by token agree, and no query sees more than s + f + w keys.

Everything here is slow and obvious. The cache, the kernels and the serving plugin are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headsink.errors import HeadsinkError


@dataclass(frozen=True, slots=True)
class Pattern:
    """The keys that the queries of one KV head may see.

    Parameters
    ----------
    sink : first tokens of the text that stay visible.
    floating : floating sinks that are visible, at most: the last ones that have left the window.
    window : last keys that are visible, the query's own among them; `None` is full attention.

    `Pattern()` is full attention, `Pattern(4, 0, 128)` is StreamingLLM's shape (arXiv 2309.17453), `Pattern(4, 0, 0)`
    sees the first tokens only and `Pattern(0, 0, 0)` nothing: its output is zero.
    """

    sink: int = 0
    floating: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("sink", "floating", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise HeadsinkError(f"{name}: {value!r} is not a whole number of tokens, 0 or more")
        if self.window is None and (self.sink or self.floating):
            raise HeadsinkError("window: full attention (window=None) sees every key, so sink and floating must be 0")

    @property
    def full(self) -> bool:
        return self.window is None

    def size(self, context: int) -> int:
        """Keys held for a text of `context` tokens."""
        return context if self.window is None else min(context, self.sink + self.floating + self.window)

    def __str__(self) -> str:
        if self.window is None:
            return "full"
        return f"{self.sink}+{self.floating}f+{self.window}"


FULL = Pattern()


def floating_sinks(pattern: Pattern, queries: Tensor, keys: Tensor, short: Tensor) -> Tensor:
    """Which keys are their head's floating sinks at each query: bool [..., queries, keys]. Arguments as for `visible`."""
    candidates = short & (keys >= pattern.sink)
    left = candidates[..., None, :] & (keys[..., None, :] <= queries[..., :, None] - (pattern.window or 0))
    # A key's rank among the candidates, from 1, and how many have left: all but the last f of those are let go.
    rank, most = candidates.cumsum(-1)[..., None, :], left.sum(-1, keepdim=True)
    return left & (rank > most - pattern.floating)


def visible(pattern: Pattern, queries: Tensor, keys: Tensor, short: Tensor) -> Tensor:
    """The mask of section "definition": bool [..., queries, keys], True where the query sees the key.

    queries: int [..., queries] positions. keys: int [..., keys] positions, ascending from the text's first token,
    negative for padding, which nobody sees. short: bool [..., keys].
    """
    i, j = queries[..., :, None], keys[..., None, :]
    causal = (j <= i) & (j >= 0)
    if pattern.window is None:
        return causal.expand(*torch.broadcast_shapes(causal.shape[:-2], short.shape[:-1]), *causal.shape[-2:])
    near = i - j < pattern.window
    return causal & ((j < pattern.sink) | near | floating_sinks(pattern, queries, keys, short))


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: Sequence[Pattern],
    thresholds: Tensor,
    scaling: float,
    padding: Tensor | None = None,
) -> Tensor:
    """Attention of a whole text under one pattern per KV head, written out.

    query: [batch, query heads, keys or fewer, dim], the last queries of the text. key, value: [batch, KV heads, keys,
    dim]. thresholds: [KV heads], the value norm below which a key can be a floating sink. padding: int [batch], tokens of
    left padding in each row. Returns [batch, query heads, queries, dim] in the query's dtype; zero where a query
    sees nothing.
    """
    batch, n_keys = key.shape[0], key.shape[2]
    group = query.shape[1] // key.shape[1]
    columns = torch.arange(n_keys, device=key.device)
    offsets = torch.zeros(batch, dtype=torch.long, device=key.device) if padding is None else padding
    positions = columns - offsets[:, None]  # [batch, keys]
    short = value.float().norm(dim=-1) < thresholds.to(value.device)[:, None]  # [batch, KV heads, keys]
    output = torch.zeros_like(query)
    for head, pattern in enumerate(patterns):
        mask = visible(pattern, positions[:, n_keys - query.shape[2] :], positions, short[:, head])[:, None]
        rows = slice(head * group, (head + 1) * group)
        scores = query[:, rows] @ key[:, head : head + 1].transpose(-1, -2) * scaling
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)  # no key at all: zero
        output[:, rows] = weights @ value[:, head : head + 1]
    return output
