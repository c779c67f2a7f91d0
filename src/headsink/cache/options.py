"""What the KV heads of a layer have in common in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headsink.attention.formats import KVDtype
from headsink.eviction.scorers import LINEAR, Scorer
from headsink.models.rope import Rotary


@dataclass(frozen=True)
class LayerOptions:
    """Options of all KV heads of a layer.

    weights: scorer weights, [KV heads, features]. scorer: of the weights. decode_window: the window of every head at least while
    decoding. rotary: how the layer rotates queries, for cache-relative positions (models/rope.py), else None. exact: heads with
    full attention use the same call as transformers where `sdpa` can express it, even if a kernel is faster. kv_dtype: of cached
    keys and values (attention/formats.py).
    """

    weights: Tensor
    scorer: Scorer = LINEAR
    decode_window: int = 0
    rotary: Rotary | None = None
    exact: bool = True
    kv_dtype: KVDtype = "auto"
