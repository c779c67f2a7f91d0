"""The fields of the table that gives kernels the addresses and sizes of a layer's KV buffers, and its update per token."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headsink.attention.int8 import SCALE_BYTES
from headsink.errors import must_be


class KVField(IntEnum):
    """The fields of the table for one KV head of one sequence.

    KEYS, VALUES: address of [slots, dim], or of int8 [slots, dim + 4] (attention/int8.py). VISIBLE: address of bool [slots].
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
    batch, heads, slots, width = keys.shape
    int8 = keys.dtype == torch.int8
    dim = width - SCALE_BYTES * int8
    like = keys.shape, torch.int8 if int8 else query.dtype, query.device
    must_be("attention: queries", (query.shape[0], query.shape[1] % max(heads, 1), query.shape[3]), (batch, 0, dim))
    must_be("attention: keys", (keys.shape, keys.dtype, keys.device), like)
    must_be("attention: values", (values.shape, values.dtype, values.device), like)
    must_be("attention: flags", (visible.shape, visible.dtype, visible.device), (like[0][:3], torch.bool, query.device))
    must_be("attention: slots up to the last token's", end, min(max(end, 0), slots))
