"""A KV cache that holds only what the plan keeps, as transformers wants a cache: a `PlanLayer` (cache_layer.py) where the
plan governs,
transformers' own where the model has a sliding window."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from headsink.attention.params import Padding
from headsink.cache.layer import PlanLayer
from headsink.errors import HeadsinkError
from headsink.plan.plan import Plan


class PlanCache(Cache):
    """The KV cache of one plan. An ordinary transformers `Cache`; `nbytes()` is the memory that it holds."""

    def __init__(
        self,
        plan: Plan,
        windows: tuple[int | None, ...],
        inverse: Tensor | None = None,
        exact: bool = True,
    ):
        layers: list[CacheLayerMixin] = []
        for index, (heads, window) in enumerate(zip(plan.layers, windows, strict=True)):
            if heads is None:
                layers.append(DynamicSlidingWindowLayer(sliding_window=window))
            else:
                patterns = [head.pattern for head in heads]
                layers.append(PlanLayer(patterns, plan.scores(index), inverse, exact))
        super().__init__(layers=layers)
        self.plan, self.exact = plan, exact
        self.model: weakref.ref[Any] | None = None  # that it was made for

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None}

    def freeze(self) -> None:
        """From now on nothing is let go: all that is held now stays visible to every later token, and so do later tokens.

        What presses that compress a context once do; memory then grows with every token. Tokens that were recorded stay; those
        that come after can be taken back, without recording. Layers that slide by themselves go on as they are. Raises
        HeadsinkError where positions are counted in the cache.
        """
        if self.plan.positions == "cache-relative":
            raise HeadsinkError("positions: counted in this cache, so its windows must go on; use a plan with 'text'")
        for layer in self.layers:
            if isinstance(layer, PlanLayer):
                layer.freeze()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -`tokens_to_remove` tokens of every layer, or of none if one of them cannot."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, PlanLayer):
                layer.check_crop(tokens_to_remove)
            elif not layer.record_past and layer.get_seq_length() >= layer.sliding_window:
                raise HeadsinkError(
                    f"crop: layer {number} has a sliding window that is full; call the cache's activate_past_recording() first"
                )
        super().crop(tokens_to_remove)

    @property
    def rows(self) -> int:
        """Texts of the batch that the cache holds, 0 if it is empty."""
        first = self.layers[0]
        if isinstance(first, PlanLayer):
            return first.groups[0].keys.shape[0] if first.groups else 0
        return first.keys.shape[0] if first.is_initialized else 0

    @property
    def on_card(self) -> bool:
        """Whether a step on a GPU (gpu/decoder.py) runs."""
        return any(layer.on_card is not None for layer in self.layers if isinstance(layer, PlanLayer))

    @property
    def held(self) -> bool:
        """Whether nothing is evicted any more (`freeze`)."""
        return any(layer.held for layer in self.layers if isinstance(layer, PlanLayer))

    @property
    def padding(self) -> Padding | None:
        """What rows do not see, None if they see all."""
        groups = (layer.groups for layer in self.layers if isinstance(layer, PlanLayer))
        return next((own[0].padding for own in groups if own), None)

    def check_whole(self) -> None:
        """Raise if the layers hold different numbers of tokens, as an interrupted pass leaves them."""
        lengths = {layer.get_seq_length() for layer in self.layers}
        if len(lengths) > 1:
            raise HeadsinkError(
                f"this cache is incomplete: its layers hold {min(lengths)} to {max(lengths)} tokens, since a pass "
                "over it was interrupted; start with a new cache"
            )

    def hide(self, hidden: Tensor) -> None:
        """Of the last columns, those that a row is not to see: bool [batch, columns]. For caches that let nothing go."""
        for layer in self.layers:
            if isinstance(layer, PlanLayer):
                for group in layer.groups:
                    group.hide(hidden)

    def fill(self, full: Cache, padding: Padding | None = None, scores: Mapping[int, Tensor] | None = None) -> None:
        """Take over, into this empty cache, what the model itself has read, cut to what the plan keeps; `full` is emptied.

        scores: of layers, [batch, KV heads, tokens], to choose top-k keys by in place of the plan's.
        """
        pairs = list(zip(self.layers, full.layers, strict=True))
        if not all(isinstance(layer, PlanLayer) or type(layer) is type(before) for layer, before in pairs):
            raise HeadsinkError(
                "layers of this model slide by themselves: make the cache DynamicCache(config=model.config)"
            )
        for index, (layer, before) in enumerate(pairs):
            if isinstance(layer, PlanLayer):
                layer.fill(before.keys, before.values, padding, None if scores is None else scores[index])
                before.keys, before.values, before.is_initialized = None, None, False
            else:
                self.layers[index] = before

    def nbytes(self) -> int:
        """Bytes of memory held, bookkeeping included."""
        return nbytes(self)


def nbytes(cache: Cache) -> int:
    """Bytes of memory that any transformers cache holds: the whole storage behind each of its tensors, once."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        if isinstance(layer, PlanLayer):
            tensors = [layer.weights, *(t for group in layer.groups for t in group.tensors())]
        else:
            tensors = [t for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
