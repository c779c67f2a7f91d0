"""What a step of our own (decode.py) takes for granted of a cache: kernels go by addresses that were read before."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from headsink.errors import HeadsinkError, must_be
from headsink.models.spec import Architecture


class Held:
    """What a step of our own (decode.py) has read of a cache: that it fits the model, and later, that nobody has changed it."""

    def __init__(self, model: Architecture, layers: Sequence[Any], kind: torch.dtype):
        self.layers = layers
        groups = [layer.groups for layer in layers]
        if not layers or not all(groups):
            raise HeadsinkError("decode: a cache is needed that holds a text")
        if any(g.recent is not None or (g.recording and g.evicts) for own in groups for g in own):
            raise HeadsinkError("decode: a cache is needed that is not being recorded")
        self.length, self.rows = layers[0].seen, len(groups[0][0].keys)
        must_be("decode: layers of the cache", len(layers), model.layers)
        for number, layer in enumerate(layers):
            keys = layer.groups[0].keys
            found = len(layer.patterns), keys.shape[3], keys.dtype, len(keys), layer.seen, layer.groups[0].length
            right = model.kv_heads, model.head_dim, kind, self.rows, self.length, self.length
            must_be(
                f"decode: KV heads, head size, dtype, texts and tokens of the cache in layer {number}", found, right
            )
        self.buffers = self._now()

    def _now(self) -> list[Any]:
        """Buffers are made anew when rows change, when the cache grows, and when keys are held that would have gone."""
        return [buffer for layer in self.layers for group in layer.groups for buffer in (group.keys, group.scores)]

    def check(self, texts: tuple[int, ...]) -> None:
        """Raise unless the cache is as it was, and tokens of all of its texts are given, [texts]."""
        now = self._now()
        same = len(now) == len(self.buffers) and all(map(operator.is_, now, self.buffers))
        if not same or self.layers[0].seen != self.length:
            raise HeadsinkError(
                "decode: the cache was changed by others; call resume() after a change, or make a new step"
            )
        must_be("decode: texts that tokens are given of", texts, (self.rows,))
