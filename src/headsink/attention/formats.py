"""The formats in which keys and values are cached, by `kv_dtype`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headsink.attention import int4, int8

KVDtype = Literal["auto", "int8", "k8v4"]


class Rows(NamedTuple):
    """How a cache stores the coordinates of a key or a value in a row.

    dtype: of the row. width: its numbers, from the head size. quantize: [..., dim] to rows; dequantize: rows to [..., dim] of a
    dtype. multiple: what head sizes are a multiple of.
    """

    dtype: torch.dtype
    width: Callable[[int], int]
    quantize: Callable[[Tensor], Tensor]
    dequantize: Callable[[Tensor, torch.dtype], Tensor]
    multiple: int


INT8 = Rows(torch.int8, int8.width, int8.quantize, int8.dequantize, 4)
INT4 = Rows(torch.uint8, int4.width, int4.quantize, int4.dequantize, int4.GROUP)
# Keys and values; without an entry both have the model's dtype.
FORMATS: dict[str, tuple[Rows, Rows]] = {"int8": (INT8, INT8), "k8v4": (INT8, INT4)}


def encode(kv_dtype: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values, [..., dim], as a cache holds them. Those that are in this form stay as they are."""
    if kv_dtype not in FORMATS or key.dtype == torch.int8:
        return key, value
    keys, values = FORMATS[kv_dtype]
    return keys.quantize(key), values.quantize(value)


def decode(kv_dtype: str, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows of keys and values of a cache as numbers of a dtype, [..., dim]."""
    if kv_dtype not in FORMATS:
        return keys, values
    key, value = FORMATS[kv_dtype]
    return key.dequantize(keys, dtype), value.dequantize(values, dtype)


def stored(kv_dtype: str, dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
    """Return the width and the dtype of the rows of keys, and of values. dtype: of the model."""
    if kv_dtype not in FORMATS:
        return (dim, dtype), (dim, dtype)
    key, value = FORMATS[kv_dtype]
    return (key.width(dim), key.dtype), (value.width(dim), value.dtype)
