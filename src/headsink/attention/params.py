"""Parameters of attention: scale, soft cap and sink logits of the softmax, padding, and the inputs of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

QUERY_BLOCK = 256  # queries per block in torch: the fastest of 128, 256, 512 for a windowed head on 2 cores


@dataclass(frozen=True)
class Inputs:
    """The inputs of one attention layer for one text: query, key and value are [1, heads, tokens, dim], after rotary embedding.

    scaling: factor of the logits. sliding: the layer's own window in tokens, None for full attention. softcap: logits become
    softcap x tanh(logits / softcap), None if they are not capped. sink_logits: float [query heads], a learned logit in the
    softmax without a value (gpt-oss), None in most families.
    """

    module: nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    sliding: int | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether this is causal softmax attention without window, cap or sink logits."""
        return self.softcap is None and self.sink_logits is None and (self.sliding or self.length) >= self.length

    @property
    def params(self) -> AttentionParams:
        return AttentionParams(self.scaling, self.softcap, self.sink_logits)

    @property
    def length(self) -> int:
        return self.key.shape[2]

    def prefix(self, length: int) -> Self:
        """Return the first `length` tokens. Attention is causal, so these are the inputs of the shorter text."""
        names = [field.name for field in fields(self) if field.name in ("query", "key", "value", "output")]
        return replace(self, **{name: getattr(self, name)[:, :, :length] for name in names})


@dataclass(frozen=True)
class Padding:
    """The padding of a batch.

    tokens: left padding, int64 [batch]. most: the largest of `tokens`. hidden: bool [batch, columns], padding between tokens,
    such as after a conversation's turn that ended early; None if there is none. right: the batch in the cache is padded on the
    right, so it cannot be continued.
    """

    tokens: Tensor
    most: int
    hidden: Tensor | None = None
    right: bool = False

    def __getitem__(self, _: Any) -> Self:
        """The padding for the last queries, as transformers asks for it in Gemma 4."""
        return self

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Padding | None:
        tokens, hidden = change(self.tokens), None if self.hidden is None else change(self.hidden)
        some = self.right or hidden is not None or bool(tokens.any())
        return Padding(tokens, int(tokens.max()), hidden, self.right) if some else None


class AttentionParams(NamedTuple):
    """Parameters of the softmax.

    scaling: factor of the logits. softcap: logits become softcap x tanh(logits / softcap), None if they are not capped.
    sink_logits: float [query heads], a learned logit in the softmax without a value, None in most families.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether `sdpa` can express the softmax."""
        return self.softcap is None and self.sink_logits is None

    def of(self, heads: list[int], kv_heads: int) -> AttentionParams:
        """Return the parameters for the queries of some KV heads."""
        if self.sink_logits is None:
            return self
        return self._replace(sink_logits=self.sink_logits.view(kv_heads, -1)[heads].flatten())

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def shares(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Return the softmax of logits, [..., keys], without the weight of `sink_logits`, which are broadcast to [..., 1]."""
    if sink_logits is None:
        return logits.softmax(-1)
    return torch.cat([logits, sink_logits.to(logits).expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
