"""PlanCache, a transformers `Cache` that stores only the keys and values that a plan keeps.

Its layers are `PlanLayer` (cache/layer.py), and transformers' own where the model has neither full nor sliding-window attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
)

from headsink.attention.formats import FORMATS, KVDtype
from headsink.attention.params import Padding
from headsink.cache.layer import PlanLayer
from headsink.cache.options import LayerOptions
from headsink.cache.segments import DENSE, PrefillOptions
from headsink.errors import HeadsinkError
from headsink.eviction.scorers import SCORERS
from headsink.models.rope import Rotary
from headsink.models.spec import Architecture
from headsink.plan.plan import Plan


class PlanCache(Cache):
    """The KV cache of one plan, a transformers `Cache`. `nbytes()` is its memory in bytes.

    heads: query heads, KV heads and head size of every layer.
    rotations: of every layer (attention/rotary.py). kv_dtype: "auto", the model's, or one of `FORMATS`.
    """

    def __init__(
        self,
        plan: Plan,
        shape: Architecture,
        rotations: Sequence[Rotary | None] | None = None,
        exact: bool = True,
        prefill: PrefillOptions = DENSE,
        kv_dtype: KVDtype = "auto",
    ):
        multiple = max((rows.multiple for rows in FORMATS.get(kv_dtype, ())), default=1)
        if odd := [dim for _, _, dim in shape.heads if dim % multiple]:
            raise HeadsinkError(
                f"kv_dtype: {kv_dtype!r} takes head sizes that are multiples of {multiple}, and the model has {odd[0]}"
            )
        layers: list[CacheLayerMixin] = []
        for index, heads in enumerate(plan.layers):
            if (window := shape.windows[index]) is not None:
                layers.append(
                    PlanLayer.of_window(window, *shape.heads[index][1:], exact, shape.shared[index], kv_dtype)
                )
            elif heads is None:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[shape.kinds[index]](**shape.cache_arguments[index]))
            else:
                patterns = [head.pattern for head in heads]
                rotation = None if rotations is None else rotations[index]
                rotary = rotation if plan.positions == "cache-relative" else None
                scorer = SCORERS[plan.scorer]
                own = LayerOptions(plan.scores(index), scorer, plan.decode_window, rotary, exact, kv_dtype)
                layers.append(PlanLayer(patterns, own, replace(prefill, rotary=rotation), shared=shape.shared[index]))
        super().__init__(layers=layers)
        self.plan, self.exact, self.prefill, self.heads = plan, exact, prefill, shape.heads
        self.kv_dtype: KVDtype = kv_dtype
        self.model: weakref.ref[Any] | None = None  # the model that the cache was created for

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None}

    def freeze(self) -> None:
        """Stop evicting: all cached keys and all later keys stay visible to every later token.

        This is prefill compression; memory grows with every later token. Recorded tokens are kept. Later tokens can be cropped
        without recording. Layers with a sliding window of the model are not changed. Raises HeadsinkError for cache-relative
        positions.
        """
        if self.plan.positions == "cache-relative":
            raise HeadsinkError(
                "positions: a cache with 'cache-relative' ones must keep evicting; use a plan with 'absolute'"
            )
        for layer in self.layers:
            if isinstance(layer, PlanLayer):
                layer.freeze()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens from every layer. If a layer cannot, raise and change nothing."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, PlanLayer):
                layer.check_crop(tokens_to_remove)
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                raise HeadsinkError(f"crop: layer {number} has a recurrent state, which cannot be taken back")
        super().crop(tokens_to_remove)

    @property
    def rows(self) -> int:
        """The number of cached sequences, 0 if the cache is empty."""
        first = next(layer for layer in self.layers if isinstance(layer, CacheLayerMixin))  # with attention
        if isinstance(first, PlanLayer):
            return first.groups[0].keys.shape[0] if first.groups else 0
        return first.keys.shape[0] if first.is_initialized else 0

    @property
    def on_card(self) -> bool:
        """Whether a decode step on a GPU is running (decoding/cuda.py)."""
        return any(layer.on_card is not None for layer in self.layers if isinstance(layer, PlanLayer))

    @property
    def frozen(self) -> bool:
        """Whether the cache is frozen, so nothing is evicted (`freeze`)."""
        return any(layer.frozen for layer in self.layers if isinstance(layer, PlanLayer))

    @property
    def padding(self) -> Padding | None:
        """The padding of the batch, or None."""
        groups = (layer.groups for layer in self.layers if isinstance(layer, PlanLayer))
        return next((own[0].padding for own in groups if own), None)

    def check_whole(self) -> None:
        """Raise if the layers have different numbers of tokens, which happens after an interrupted forward pass."""
        lengths = {layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)}
        if len(lengths) > 1:
            raise HeadsinkError(
                f"this cache is incomplete: its layers hold {min(lengths)} to {max(lengths)} tokens, since a pass "
                "over it was interrupted; start with a new cache"
            )

    def hide(self, hidden: Tensor) -> None:
        """Hide some of the last columns: bool [batch, columns]. For caches that do not evict."""
        for layer in self.layers:
            if isinstance(layer, PlanLayer):
                for group in layer.groups:
                    group.hide(hidden)

    def fill(self, full: Cache, padding: Padding | None = None, scores: Mapping[int, Tensor] | None = None) -> None:
        """Move the keys that the plan keeps from a full cache into this empty one. `full` is emptied.

        scores: {layer: importance scores [batch, KV heads, tokens]} that choose the top-k keys instead of the plan's scorer.
        """
        pairs = list(zip(self.layers, full.layers, strict=True))
        for index, (layer, before) in enumerate(pairs):
            if not isinstance(layer, PlanLayer):
                self.layers[index] = before
                continue
            if layer.sliding is not None:
                keys, values = (states[:, :, -layer.sliding :] for states in (before.keys, before.values))
                layer.fill_window(keys, values, before.get_seq_length(), padding)
            else:
                layer.fill(before.keys, before.values, padding, None if scores is None else scores[index])
            before.keys, before.values, before.is_initialized = None, None, False

    def nbytes(self) -> int:
        """Return the memory of the cache in bytes, including bookkeeping."""
        return nbytes(self)


def nbytes(cache: Cache) -> int:
    """Return the memory of any transformers cache in bytes: the storage of each of its tensors, counted once."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        if isinstance(layer, PlanLayer):
            tensors = [layer.options.weights, *(t for group in layer.groups for t in group.tensors())]
        else:
            values = (value.values() if isinstance(value, dict) else [value] for value in vars(layer).values())
            tensors = [state for value in values for state in value if isinstance(state, Tensor)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
