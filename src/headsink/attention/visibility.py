"""KeyVisibility: which keys each query sees, in the form that the prefill kernels use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from headsink.errors import must_be


class HeadVisibility(NamedTuple):
    """The fields of `KeyVisibility` that differ between KV heads with different patterns."""

    window: int | None
    far: int
    reach: int


@dataclass(frozen=True)
class KeyVisibility:
    """Which keys many queries see: the query of column c sees the keys with column <= c < until.

    until: int [batch x heads, keys]. first: the column of the first query. prefix_slots: the number of keys at the start that
    precede every query; the keys after them belong to consecutive columns from `start` on. The other fields bound `until`, so
    that kernels can skip keys. window: all of the last `window` columns are visible; None: all columns. gaps: some of these may
    be hidden. far: the largest number of other visible keys of a query. reach: those are among the first `reach` keys. each:
    the values of every head, if they differ.
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
    """Raise unless queries, keys and visibility have the shapes that `Backend.prefill` expects."""
    heads, n_keys, (batch, query_heads, _, dim) = len(keys), keys.shape[1], query.shape
    like = (heads, n_keys, dim), query.dtype, query.device
    must_be("attention: heads left over", (heads % max(batch, 1), batch * query_heads % max(heads, 1)), (0, 0))
    must_be("attention: keys", (keys.shape, keys.dtype, keys.device), like)
    must_be("attention: values", (values.shape, values.dtype, values.device), like)
    must_be("attention: ends of visibility", (sight.until.shape, sight.until.device), ((heads, n_keys), query.device))
    must_be("attention: heads with their own visibility", len(sight.each or keys), heads)
    must_be("attention: prefix slots", sight.prefix_slots, min(sight.prefix_slots, n_keys))
