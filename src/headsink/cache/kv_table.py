"""KVTable: the buffer addresses and sizes of all KV heads of a layer, for the CPU and GPU kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headsink.attention.formats import stored
from headsink.attention.kv_table import KVField, advance
from headsink.cache.slots import Slots
from headsink.errors import must_be
from headsink.eviction.pattern import FOREVER


class KVTable:
    """The table of the KV heads of `groups`, for every sequence of a batch.

    table: int64 [sequences, KV heads, len(KVField)]; dtypes: of the buffers of keys and of values. It contains addresses, so the
    buffers must not be reallocated. They get room for `tokens` more tokens, or for fewer if a head would start evicting. until:
    the first column without room.
    """

    def __init__(self, groups: Sequence[Slots], tokens: int):
        heads, sequences = sum(len(group.heads) for group in groups), len(groups[0].keys)
        self.dtypes = groups[0].keys.dtype, groups[0].values.dtype
        self.table: Any = np.full((sequences, heads, len(KVField)), -1)
        must_be("KV heads of a layer", sorted(head for group in groups for head in group.heads), list(range(heads)))
        for group in groups:
            group.make_room(tokens, early=False)
            _check(group, groups[0])
            own = group.heads
            for field in (KVField.KEYS, KVField.VALUES, KVField.VISIBLE, KVField.SCORES):
                buffer = (group.keys, group.values, group.visible, group.scores)[field]
                size = math.prod(buffer.shape[2:]) * buffer.element_size()
                number = np.arange(sequences * len(own)).reshape(sequences, len(own))
                self.table[:, own, field] = buffer.data_ptr() + size * number
            weights = group.weights
            self.table[:, own, KVField.WEIGHTS] = weights.data_ptr() + 4 * weights.shape[-1] * np.arange(len(own))
            self.table[:, own, KVField.SINK] = group.pattern.sink
            self.table[:, own, KVField.TOP_K] = group.scores.shape[-1]
            self.table[:, own, KVField.PREFIX_SLOTS] = group.prefix_slots
            self.table[:, own, KVField.START] = group.start
            self.table[:, own, KVField.WINDOW] = FOREVER if group.window is None else group.window
        padding = groups[0].padding
        self.table[..., KVField.PAD] = 0 if padding is None else padding.tokens.cpu().numpy()[:, None]
        self.until = min(group.room for group in groups)

    def at(self, length: int) -> Any:
        """Return the table for a token in column `length`."""
        return advance(self.table, length)


def _check(group: Slots, first: Slots) -> None:
    """Raise unless the buffers of a group have the shapes, dtypes and devices that the kernels expect."""
    (key_width, key_dtype), (value_width, value_dtype) = stored(first.kv_dtype, first.head_dim, first.dtype)
    slots = (len(first.keys), len(group.heads), group.keys.shape[2])
    place = first.keys.device, True
    for what, buffer, right in (
        ("keys", group.keys, ((*slots, key_width), key_dtype, *place)),
        ("values", group.values, ((*slots, value_width), value_dtype, *place)),
        ("flags", group.visible, (slots, torch.bool, *place)),
        ("scores", group.scores, ((*slots[:2], group.scores.shape[2]), torch.float32, *place)),
    ):
        found = tuple(buffer.shape), buffer.dtype, buffer.device, buffer.is_contiguous()
        must_be(f"cache: {what} of KV heads {group.heads}", found, right)
    if group.scores.shape[2]:
        weights = group.weights
        actual = tuple(weights.shape), weights.dtype, weights.device, weights.is_contiguous()
        expected = (len(group.heads), group.scorer.n_features(first.head_dim)), torch.float32, first.keys.device, True
        must_be(f"cache: scorer weights of KV heads {group.heads}", actual, expected)
    must_be("cache: cached tokens", group.length, first.length)
    ring, prefix_slots = group.keys.shape[2] - group.prefix_slots, group.pattern.sink + group.scores.shape[2]
    must_be(
        "cache: slots in front of the window", group.prefix_slots >= (0 if group.window is None else prefix_slots), True
    )
    must_be("cache: slots of the window", ring >= group._held(), True)
    if group.padding is not None:
        must_be("cache: rows of padding", tuple(group.padding.tokens.shape), slots[:1])
