"""Where the heads of a layer lie in memory, and how they fill: a table for the kernels of a CPU and of a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headsink.attention.kv_table import KVField, advance
from headsink.cache.slots import Slots
from headsink.errors import must_be
from headsink.eviction.pattern import FOREVER
from headsink.eviction.scoring import n_features


class KVTable:
    """The heads of some groups, of every text of a batch. table: int64 [texts, KV heads, len(Field)]. Addresses are read once:
    the buffers must stay where they are. They are made ready for so many tokens, or for fewer where a head is about to let keys
    go for the first time. until: the column that they have no room for.
    """

    def __init__(self, groups: Sequence[Slots], tokens: int):
        heads, texts = sum(len(group.heads) for group in groups), len(groups[0].keys)
        self.table: Any = np.full((texts, heads, len(KVField)), -1)
        must_be("KV heads of a layer", sorted(head for group in groups for head in group.heads), list(range(heads)))
        for group in groups:
            group.make_room(tokens, early=False)
            _check(group, groups[0])
            own = group.heads
            for field in (KVField.KEYS, KVField.VALUES, KVField.VISIBLE, KVField.SCORES):
                buffer = (group.keys, group.values, group.visible, group.scores)[field]
                apart = math.prod(buffer.shape[2:]) * buffer.element_size()
                number = np.arange(texts * len(own)).reshape(texts, len(own))
                self.table[:, own, field] = buffer.data_ptr() + apart * number
            weights = group.weights
            self.table[:, own, KVField.WEIGHTS] = weights.data_ptr() + 4 * weights.shape[-1] * np.arange(len(own))
            self.table[:, own, KVField.SINK] = group.pattern.sink
            self.table[:, own, KVField.TOP_K] = group.scores.shape[-1]
            self.table[:, own, KVField.ANCHORS] = group.prefix_slots
            self.table[:, own, KVField.START] = group.start
            self.table[:, own, KVField.WINDOW] = FOREVER if group.window is None else group.window
        padding = groups[0].padding
        self.table[..., KVField.PAD] = 0 if padding is None else padding.tokens.cpu().numpy()[:, None]
        self.until = min(group.room for group in groups)

    def at(self, length: int) -> Any:
        """The table for a token that comes as column `length`."""
        return advance(self.table, length)


def _check(group: Slots, first: Slots) -> None:
    """Raise unless a group holds what the table says, as the layer's first one does: kernels take it from there."""
    dim = first.keys.shape[3]
    slots = (len(first.keys), len(group.heads), group.keys.shape[2])
    numbers = first.keys.dtype, first.keys.device, True
    for what, buffer, right in (
        ("keys", group.keys, ((*slots, dim), *numbers)),
        ("values", group.values, ((*slots, dim), *numbers)),
        ("flags", group.visible, (slots, torch.bool, *numbers[1:])),
        ("scores", group.scores, ((*slots[:2], group.scores.shape[2]), torch.float32, *numbers[1:])),
    ):
        found = tuple(buffer.shape), buffer.dtype, buffer.device, buffer.is_contiguous()
        must_be(f"cache: {what} of KV heads {group.heads}", found, right)
    if group.scores.shape[2]:
        weights = group.weights
        here = tuple(weights.shape), weights.dtype, weights.device, weights.is_contiguous()
        there = (len(group.heads), n_features(dim)), torch.float32, first.keys.device, True
        must_be(f"cache: weights of scores of KV heads {group.heads}", here, there)
    must_be("cache: tokens held", group.length, first.length)
    ring, prefix_slots = group.keys.shape[2] - group.prefix_slots, group.pattern.sink + group.scores.shape[2]
    must_be(
        "cache: slots in front of the window", group.prefix_slots >= (0 if group.window is None else prefix_slots), True
    )
    must_be("cache: slots of the window", ring >= group._held(), True)
    if group.padding is not None:
        must_be("cache: rows of padding", tuple(group.padding.tokens.shape), slots[:1])
