"""Continuations on a cached prefix: run several of them in one forward pass over the keys and values of a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.interface import AttentionRecord, observe_attention, replace_attention
from headsink.attention.params import Inputs
from headsink.models.spec import decoder, describe


class Continuations:
    """Continuations of a document of `length` tokens, concatenated: each attends to the document and to itself.

    ids, positions: int64 [tokens], of all continuations. rows: the slice of each continuation.
    """

    def __init__(self, texts: Sequence[Sequence[int]], length: int, device: torch.device):
        ends = list(accumulate(map(len, texts)))
        self.rows = [slice(end - len(text), end) for end, text in zip(ends, texts, strict=True)]
        self.ids = torch.tensor([token for text in texts for token in text], device=device)
        self.positions = torch.cat([torch.arange(length, length + len(text), device=device) for text in texts])


class Context:
    """A document and its KV cache.

    keys, values: one tensor per layer, [KV heads, tokens, dim]; in a sliding-window layer only the last tokens.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor]):
        self.model, self.ids, self.shape = model, ids, describe(model)
        self._keys, self._values = keys, values

    @property
    def length(self) -> int:
        return len(self.ids)

    def key_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Cached keys and values of a layer, [KV heads, tokens, dim]; in a sliding-window layer only the last tokens."""
        return self._keys[layer], self._values[layer]

    def run(self, continuations: Continuations, attend: Callable[[Inputs], Tensor], keep: Tensor | int = 1) -> Tensor:
        """Run the model over the continuations with `attend` as attention. Returns logits [tokens, vocabulary].

        keep: which tokens to return logits for: the last `keep`, or the indices int64 [tokens].
        """
        arguments = {"position_ids": continuations.positions[None], "use_cache": False, "logits_to_keep": keep}
        with replace_attention(self.model, attend):
            return self.model(continuations.ids[None], **arguments).logits[0]


def read(model: PreTrainedModel, ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of a prompt for a `Context`, one tensor per layer, in 16 bits."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def keep(seen: AttentionRecord) -> None:
        last = slice(0 if seen.sliding is None else max(0, seen.length - seen.sliding), None)
        kind = torch.bfloat16 if seen.key.dtype == torch.float32 else seen.key.dtype
        keys.append(seen.key[0, :, last].to(kind, copy=True))
        values.append(seen.value[0, :, last].to(kind, copy=True))

    with torch.no_grad(), observe_attention(model, keep):
        decoder(model)(torch.tensor([list(ids)], device=model.device), use_cache=False)
    return keys, values
