"""A text that a model has read, and what may come after it, run over its keys and values without reading it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.interface import Seen, observing, substituting
from headsink.attention.params import Inputs
from headsink.models.spec import decoder, describe


class Continuations:
    """Texts that may follow a document of `length` tokens, side by side: each sees the document and itself.

    ids, positions: int64 [tokens]. rows: the tokens of each.
    """

    def __init__(self, texts: Sequence[Sequence[int]], length: int, device: torch.device):
        ends = list(accumulate(map(len, texts)))
        self.rows = [slice(end - len(text), end) for end, text in zip(ends, texts, strict=True)]
        self.ids = torch.tensor([token for text in texts for token in text], device=device)
        self.positions = torch.cat([torch.arange(length, length + len(text), device=device) for text in texts])


class Context:
    """A text and the keys and values that the model made of it.

    keys, values: of each layer, [KV heads, tokens, dim]; in a layer that slides by itself the last tokens only.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor]):
        self.model, self.ids, self.shape = model, ids, describe(model)
        self._keys, self._values = keys, values

    @property
    def length(self) -> int:
        return len(self.ids)

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [KV heads, tokens, dim]; the last ones only in a layer that slides."""
        return self._keys[layer], self._values[layer]

    def run(self, branches: Continuations, attend: Callable[[Inputs], Tensor], keep: Tensor | int = 1) -> Tensor:
        """Run branches, the attention of every layer computed by `attend`: the model's logits, [tokens, vocabulary].

        keep: the tokens whose logits are made: the last so many, or those at int64 [tokens].
        """
        given = {"position_ids": branches.positions[None], "use_cache": False, "logits_to_keep": keep}
        with substituting(self.model, attend):
            return self.model(branches.ids[None], **given).logits[0]


def read(model: PreTrainedModel, ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values that the model makes of a text, for a `Context`; in 16 bits."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def keep(seen: Seen) -> None:
        last = slice(0 if seen.sliding is None else max(0, seen.length - seen.sliding), None)
        kind = torch.bfloat16 if seen.key.dtype == torch.float32 else seen.key.dtype
        keys.append(seen.key[0, :, last].to(kind, copy=True))
        values.append(seen.value[0, :, last].to(kind, copy=True))

    with torch.no_grad(), observing(model, keep):
        decoder(model)(torch.tensor([list(ids)], device=model.device), use_cache=False)
    return keys, values
