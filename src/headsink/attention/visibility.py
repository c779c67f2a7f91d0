"""Which keys the queries of a block may see, as kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from headsink.errors import must_be


class HeadVisibility(NamedTuple):
    """What a KV head sees by a pattern of its own: the fields of `KeyVisibility` of the same names."""

    window: int | None
    far: int
    reach: int


@dataclass(frozen=True)
class KeyVisibility:
    """Which keys many queries see: that of column c those with columns <= c < until.

    until: int [batch x heads, keys]. first: the column of the first query. anchors: the first so many keys come before every
    query; those after them are of the columns from `start` on, one after the other. The rest is what is known of `until`.
    window: all of the last so many columns are seen, None: all; gaps: but for some. far: other keys that a query sees at
    most; reach: they are among the first so many. each: of every head, where these differ.
    """

    until: Tensor
    first: int
    prefix_slots: int
    start: int
    window: int | None
    gaps: bool
    far: int
    reach: int
    each: list[HeadVisibility] | None = None


def check_sight(query: Tensor, keys: Tensor, values: Tensor, sight: KeyVisibility) -> None:
    """Raise unless queries, keys and what they see are of the shapes that `attend_tiles` says."""
    heads, n_keys, (batch, query_heads, _, dim) = len(keys), keys.shape[1], query.shape
    like = (heads, n_keys, dim), query.dtype, query.device
    must_be("attention: heads left over", (heads % max(batch, 1), batch * query_heads % max(heads, 1)), (0, 0))
    must_be("attention: keys", (keys.shape, keys.dtype, keys.device), like)
    must_be("attention: values", (values.shape, values.dtype, values.device), like)
    must_be("attention: ends of keys", (sight.until.shape, sight.until.device), ((heads, n_keys), query.device))
    must_be("attention: heads that see keys of their own", len(sight.each or keys), heads)
    must_be("attention: anchors", sight.prefix_slots, min(sight.prefix_slots, n_keys))
