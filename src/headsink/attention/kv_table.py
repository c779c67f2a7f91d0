"""The fields of the table that gives kernels the addresses and sizes of a layer's KV buffers, and its update per token."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headsink.attention.formats import FORMATS, stored
from headsink.errors import must_be


class KVField(IntEnum):
    """The fields of the table for one KV head of one sequence.

    KEYS, VALUES: address of [slots, dim], or of rows of attention/formats.py. VISIBLE: address of bool [slots].
    SCORES: address of float32 [top-k keys]. WEIGHTS: address of the scorer weights, float32 [features]. SINK, TOP_K: number of
    slots of sink tokens, and of top-k keys after them. PREFIX_SLOTS: number of slots before the ring. START: the column in the
    first slot of the ring, before it wraps. WINDOW: slots of the ring, FOREVER if it never wraps. PAD: tokens of left padding.

    `advance` computes these for the next token: END: slots in use after it is appended. SLOT: its slot, -1 for none. LEAVING: the
    position of the token that leaves the window, negative for none.
    """

    KEYS = 0
    VALUES = 1
    VISIBLE = 2
    SCORES = 3
    WEIGHTS = 4
    SINK = 5
    TOP_K = 6
    PREFIX_SLOTS = 7
    START = 8
    WINDOW = 9
    PAD = 10
    END = 11
    SLOT = 12
    LEAVING = 13


def advance(table: Any, length: int) -> Any:
    """Write END, SLOT and LEAVING of a token in column `length` into a table, int64 [..., len(KVField)]."""
    prefix_slots, start, window, pad = (
        table[..., field] for field in (KVField.PREFIX_SLOTS, KVField.START, KVField.WINDOW, KVField.PAD)
    )
    ring = (length - start) % np.maximum(window, 1)
    table[..., KVField.SLOT] = np.where(window > 0, prefix_slots + ring, -1)
    table[..., KVField.END] = prefix_slots + np.minimum(length + 1 - start, window)
    table[..., KVField.LEAVING] = np.where(length - start >= window, length - window - pad, -1)
    return table


def check_buffers(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, end: int) -> None:
    """Raise unless buffers have the shapes that `Backend.decode` expects."""
    (batch, heads, slots, _), dim = keys.shape, query.shape[3]
    kinds = [stored(kv_dtype, dim, query.dtype) for kv_dtype in ("auto", *FORMATS)]
    found = (keys.shape[3], keys.dtype), (values.shape[3], values.dtype)
    right = found if found in kinds else kinds[0]
    must_be("attention: queries", (query.shape[0], query.shape[1] % max(heads, 1)), (batch, 0))
    for name, rows, (width, dtype) in zip(("keys", "values"), (keys, values), right, strict=True):
        expected = (batch, heads, slots, width), dtype, query.device
        must_be(f"attention: {name}", (tuple(rows.shape), rows.dtype, rows.device), expected)
    flags = (batch, heads, slots), torch.bool, query.device
    must_be("attention: flags", (tuple(visible.shape), visible.dtype, visible.device), flags)
    must_be("attention: slots up to the last token's", end, min(max(end, 0), slots))
