"""What attention is computed with: the softmax's scale, soft cap and sink logits, padding, and the inputs of a whole text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

QUERY_BLOCK = 256  # queries handled at once in torch: the fastest of 128, 256, 512 on 2 cores, of a windowed head


@dataclass(frozen=True)
class Inputs:
    """What one attention layer is given for one text: all [1, heads, tokens, dim], rotary positions applied.

    scaling: factor on the logits. sliding: the layer's own window in tokens, None if it sees all. softcap: logits are
    softcap x tanh(logits / softcap), None if they are not capped. learned: float [query heads], a learned logit that takes
    part in the softmax and has no value (gpt-oss), None in most families.
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
        """Whether this is causal softmax attention and nothing else."""
        return self.softcap is None and self.sink_logits is None and (self.sliding or self.length) >= self.length

    @property
    def params(self) -> AttentionParams:
        return AttentionParams(self.scaling, self.softcap, self.sink_logits)

    @property
    def length(self) -> int:
        return self.key.shape[2]

    def prefix(self, length: int) -> Self:
        """The first `length` tokens: causal attention does not see what follows, so this is the shorter text."""
        names = [field.name for field in fields(self) if field.name in ("query", "key", "value", "output")]
        return replace(self, **{name: getattr(self, name)[:, :, :length] for name in names})


@dataclass(frozen=True)
class Padding:
    """What rows of a batch do not see. tokens: left padding, int64 [batch]; most: the largest of them; hidden: bool [batch,
    columns],
    columns between tokens, such as the padding after a turn of a conversation that ended early; None if there are none.
    right: the text that the cache begins with is padded on the right, so it can be read, but not continued."""

    tokens: Tensor
    most: int
    hidden: Tensor | None = None
    right: bool = False

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Padding | None:
        tokens, hidden = change(self.tokens), None if self.hidden is None else change(self.hidden)
        some = self.right or hidden is not None or bool(tokens.any())
        return Padding(tokens, int(tokens.max()), hidden, self.right) if some else None


class AttentionParams(NamedTuple):
    """How products of queries and keys become weights.

    Logits are products x scaling. softcap: they become softcap x tanh(logits / softcap), None if they are not capped. learned:
    float [query heads], a logit of each that takes part in the softmax and has no value, None in most families.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether `sdpa` can express it."""
        return self.softcap is None and self.sink_logits is None

    def of(self, heads: list[int], kv_heads: int) -> AttentionParams:
        """That of the queries of some of the KV heads."""
        if self.sink_logits is None:
            return self
        return self._replace(sink_logits=self.sink_logits.view(kv_heads, -1)[heads].flatten())

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def shares(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    """The softmax of logits, [..., keys]. learned: float, to be broadcast to [..., 1]: logits of the rows that have no value."""
    if sink_logits is None:
        return logits.softmax(-1)
    return torch.cat([logits, sink_logits.to(logits).expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
