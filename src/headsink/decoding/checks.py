"""Checks of the cache of a compiled decode step (decode.py), whose kernels use memory addresses that were read earlier."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from headsink.errors import HeadsinkError, must_be
from headsink.models.spec import Architecture


class CacheCheck:
    """The cache that a decode step has read: checks that it fits the model, and later that other code has not changed it."""

    def __init__(self, model: Architecture, layers: Sequence[Any], kind: torch.dtype):
        self.layers = layers
        groups = [layer.groups for layer in layers]
        if not layers or not all(groups):
            raise HeadsinkError("decode: the cache is empty; prefill a prompt first")
        if any(g.recent is not None or (g.recording and g.evicts) for own in groups for g in own):
            raise HeadsinkError(
                "decode: the cache records tokens so that they can be cropped; set its record_past to False"
            )
        self.length, self.rows = layers[0].seen, len(groups[0][0].keys)
        must_be("decode: layers of the cache", len(layers), model.layers)
        for number, layer in enumerate(layers):
            first = layer.groups[0]
            actual = (
                len(layer.patterns),
                first.head_dim,
                first.dtype,
                first.kv_dtype,
                len(first.keys),
                layer.seen,
                first.length,
            )
            _, kv_heads, head_dim = model.heads[number]
            right = kv_heads, head_dim, kind, groups[0][0].kv_dtype, self.rows, self.length, self.length
            must_be(
                f"decode: KV heads, head size, dtype, kv_dtype, sequences and tokens of the cache in layer {number}",
                actual,
                right,
            )
        self.buffers = self._current_buffers()

    def _current_buffers(self) -> list[Any]:
        """The cache's buffers. They are replaced when rows change, when the cache grows, and when it is frozen."""
        return [buffer for layer in self.layers for group in layer.groups for buffer in (group.keys, group.scores)]

    @property
    def same(self) -> bool:
        """Whether the cache has the buffers and the length that were read."""
        current = self._current_buffers()
        same = len(current) == len(self.buffers) and all(map(operator.is_, current, self.buffers))
        return same and self.layers[0].seen == self.length

    def check(self, sequences: tuple[int, ...]) -> None:
        """Raise unless the cache is unchanged and new tokens are given for all of its sequences. sequences: their shape."""
        if not self.same:
            raise HeadsinkError(
                "decode: the cache was changed by other code; call resume() after a change, or make a new step"
            )
        must_be("decode: sequences with new tokens", sequences, (self.rows,))
