"""Continuations on a cached prefix: run several of them in one forward pass over the keys and values of a document."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from headsink.attention.interface import AttentionRecord, observe_attention, replace_attention
from headsink.attention.params import Inputs
from headsink.errors import HeadsinkError
from headsink.models.distributed import input_device
from headsink.models.spec import decoder, describe, vocabulary
from headsink.models.transformers_names import cache_argument

STORED = {torch.float32: torch.bfloat16}  # dtype of a document's keys, where it is not the model's
CLOSE = 0.05  # difference of the logits of two calls from those of one, relative to their norm; above it the model is refused


class Continuations:
    """Continuations of a document of `length` tokens, concatenated: each attends to the document and to itself.

    ids, positions: int64 [tokens], of all continuations. rows: the slice of each continuation.
    """

    def __init__(self, texts: Sequence[Sequence[int]], length: int, device: torch.device):
        ends = list(accumulate(map(len, texts)))
        self.rows = [slice(end - len(text), end) for end, text in zip(ends, texts, strict=True)]
        self.ids = torch.tensor([token for text in texts for token in text], device=device)
        self.positions = torch.cat([torch.arange(length, length + len(text), device=device) for text in texts])

    def batch(self, tokens: Tensor) -> Tensor:
        """Return [..., tokens] of all continuations as a batch padded on the right, [continuations, ..., longest]."""
        parts = [tokens[..., rows].movedim(-1, 0) for rows in self.rows]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).movedim(1, -1)

    def join(self, batch: Tensor) -> Tensor:
        """Return a batch padded on the right, [continuations, ..., longest], as [..., tokens]."""
        counts = [rows.stop - rows.start for rows in self.rows]
        return torch.cat([row[..., :count] for row, count in zip(batch, counts, strict=True)], -1)


class Context:
    """A document and its KV cache.

    keys, values: {layer: [KV heads, tokens, dim]}; in a sliding-window layer only the last tokens. states: a cache with the
    states of recurrent layers after the document, of one sequence, for models that have such layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Sequence[int],
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        states: Cache | None = None,
    ):
        self.model, self.ids, self.shape = model, ids, describe(model)
        self._keys, self._values, self._states = keys, values, states

    @property
    def length(self) -> int:
        return len(self.ids)

    def key_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Cached keys and values that a layer attends to, [KV heads, tokens, dim]; in a sliding-window layer the last tokens."""
        source = self.shape.source(layer)
        return self._keys[source], self._values[source]

    def run(
        self, continuations: Continuations, attend: Callable[[Inputs], Tensor], keep: Tensor | None = None
    ) -> Tensor:
        """Run the model over the continuations with `attend` as attention. Returns logits [tokens, vocabulary].

        keep: the tokens to return logits for, int64 [tokens]; None: the last one.
        """
        # A number instead of indices would leave out queries in Gemma 4.
        keep = torch.tensor([len(continuations.ids) - 1], device=input_device(self.model)) if keep is None else keep
        if self.shape.recurrent:
            return self._run_rows(continuations, attend, keep)
        arguments = {"position_ids": continuations.positions[None], "use_cache": False, "logits_to_keep": keep}
        with replace_attention(self.model, attend):
            return self.model(continuations.ids[None], **arguments).logits[0]

    def _run_rows(self, continuations: Continuations, attend: Callable[[Inputs], Tensor], keep: Tensor) -> Tensor:
        """As `run`, with a row per continuation, each of which continues the states of recurrent layers."""
        cache = copy.deepcopy(self._states)
        assert cache is not None
        for layer in cache.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(torch.zeros(len(continuations.rows), dtype=torch.long))

        def attend_rows(inputs: Inputs) -> Tensor:
            query, key, value = (continuations.join(t.mT).mT[None] for t in (inputs.query, inputs.key, inputs.value))
            return continuations.batch(attend(replace(inputs, query=query, key=key, value=value))[0].mT).mT

        ids, positions = (continuations.batch(t) for t in (continuations.ids, continuations.positions))
        arguments: dict[str, Any] = {"position_ids": positions, "use_cache": True, **cache_argument(cache)}
        counts = [rows.stop - rows.start for rows in continuations.rows]
        column = torch.cat([torch.arange(count, device=ids.device) for count in counts])[keep]
        row = torch.arange(len(counts), device=ids.device).repeat_interleave(torch.tensor(counts, device=ids.device))[
            keep
        ]
        columns = column.unique()
        with replace_attention(self.model, attend_rows):
            logits: Tensor = self.model(ids, **arguments, logits_to_keep=columns).logits
        return logits[row, torch.searchsorted(columns, column)]


class _PassingLayer(CacheLayerMixin):
    """A cache layer that stores nothing and returns new keys, for attention that has the older ones. length: tokens before."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.is_initialized = length, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def states_of(cache: Cache, row: int = 0) -> Cache:
    """Return a cache with the states of the recurrent layers in one row of another cache, for a `Context`."""
    own = copy.copy(cache)
    own.layers = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            own.layers.append(copy.deepcopy(layer))
            own.layers[-1].reorder_cache(torch.tensor([row]))
        else:
            own.layers.append(_PassingLayer(cache.get_seq_length()) if isinstance(layer, CacheLayerMixin) else layer)
    return own


def read(model: PreTrainedModel, ids: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, Tensor], Cache | None]:
    """Read a document with full attention. Returns keys, values and states for a `Context`, keys and values in 16 bits."""
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    shape = describe(model)

    def keep(seen: AttentionRecord) -> None:
        if shape.keys_of[seen.layer] != seen.layer:
            return
        last = slice(0 if seen.sliding is None else max(0, seen.length - seen.sliding), None)
        kind = STORED.get(seen.key.dtype, seen.key.dtype)
        keys[seen.layer] = seen.key[0, :, last].to(kind, copy=True)
        values[seen.layer] = seen.value[0, :, last].to(kind, copy=True)

    cache = None
    if shape.recurrent:
        check_continues(model)
        cache = states_of(DynamicCache(config=model.config.get_text_config(decoder=True)))
    with torch.no_grad(), observe_attention(model, keep):
        tokens = torch.tensor([list(ids)], device=input_device(model))
        decoder(model)(tokens, **cache_argument(cache), use_cache=cache is not None)
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, _PassingLayer):
            layer.length = len(ids)
    return keys, values, cache


@torch.no_grad()
def check_continues(model: PreTrainedModel) -> None:
    """Raise if a recurrent model gives other logits in two calls than in one, as Bamba and Jamba do without their own kernels."""
    ids = torch.randint(vocabulary(model), (1, 24), generator=torch.Generator().manual_seed(0)).to(input_device(model))
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    whole = model(ids, use_cache=False).logits[:, 12:].float()
    for part in ids.split(12, 1):
        continued = model(part, **cache_argument(cache), use_cache=True).logits.float()
    if (continued - whole).norm() > CLOSE * whole.norm():
        raise HeadsinkError(
            f"{describe(model).name} gives other logits in two calls than in one, so continuations of a text cannot be scored; "
            "use a plan of windows from Plan.uniform"
        )
