"""Where the heads of a layer lie in memory, as a table for the kernels (kernels.py, `Field`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headsink.cpu.kernels import Field
from headsink.head_group import HeadGroup
from headsink.slots import FOREVER


class Layout:
    """The heads of some groups, of every text of a batch. table: int64 [texts, KV heads, len(Field)]. Addresses are read once:
    the buffers must stay where they are. They are made ready for so many tokens, or for fewer where a head is about to let keys
    go for the first time. until: the column that they have no room for.
    """

    def __init__(self, groups: Sequence[HeadGroup], tokens: int):
        heads, texts = sum(len(group.heads) for group in groups), len(groups[0].keys)
        self.table: Any = np.full((texts, heads, len(Field)), -1)
        self.window, self.anchors, self.start = np.zeros((3, heads), np.int64)
        for group in groups:
            group.make_room(tokens, early=False)
            own = group.heads
            for field in (Field.KEYS, Field.VALUES, Field.VISIBLE, Field.SCORES):
                buffer = (group.keys, group.values, group.visible, group.scores)[field]
                apart = buffer.stride(1) * buffer.element_size()
                number = np.arange(texts * len(own)).reshape(texts, len(own))
                self.table[:, own, field] = buffer.data_ptr() + apart * number
            weights = group.weights
            self.table[:, own, Field.WEIGHTS] = weights.data_ptr() + 4 * weights.shape[-1] * np.arange(len(own))
            self.table[:, own, Field.SINK] = group.pattern.sink
            self.table[:, own, Field.FLOATING] = group.scores.shape[-1]
            self.window[own] = FOREVER if group.window is None else group.window
            self.anchors[own], self.start[own] = group.anchors, group.start
        self.until = min(group.room for group in groups)
        padding = groups[0].padding
        self.pads: Any = np.zeros((texts, 1), np.int64) if padding is None else padding.tokens.numpy()[:, None]

    def at(self, length: int) -> Any:
        """The table for a token that comes as column `length`."""
        return advance(self.table, self.window, self.anchors, self.start, self.pads, length)


def advance(table: Any, window: Any, anchors: Any, start: Any, pads: Any, length: int) -> Any:
    """Write into a table [..., texts, heads, len(Field)] what a token that comes as column `length` changes. window, anchors,
    start: int64 [..., heads]; pads: int64 [texts, 1], tokens of padding."""
    ring = np.where(window < FOREVER, length % np.maximum(window, 1), length - start)
    table[..., Field.SLOT] = np.where(window > 0, anchors + ring, -1)
    table[..., Field.END] = anchors + np.minimum(length + 1 - start, window)
    table[..., Field.LEAVING] = np.where(length >= window, length - window - pads, -1)
    return table
