"""GPU kernels that sum the attention of sampled queries over bands of keys, and over queries.

The visible keys of a query are divided into bands by distance. A program handles some queries of one KV head, with the heads of
the group adjacent, and one band. It sums attention weights relative to the largest logit so far (FlashAttention's running
maximum). PyTorch combines the bands, about twenty per query. A second kernel computes the attention to each key, summed over
queries; each of its programs handles some keys. The order of all sums is fixed, so results are deterministic.

A layer's own sliding window truncates bands, and a learned sink logit is applied after summation. The first kernel needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headsink.attention.cuda.common import LOG2E, cap, product
from headsink.attention.params import Inputs
from headsink.errors import must_be

TILE_BYTES = 2**13  # of the keys in a tile, and of the values: more would not fit into registers
WIDEST = 2**14  # largest number of keys in a band, which balances the work of the programs
LN2 = math.log(2)


@triton.jit
def _logits(a, b, scaling, softcap, M: tl.constexpr, N: tl.constexpr, CAPPED: tl.constexpr):
    """Return the logits of a b in base 2: float32 [M, N]."""
    logits = product(a, b, tl.zeros([M, N], tl.float32))
    return cap(logits * scaling, softcap) * LOG2E if CAPPED else logits * (scaling * LOG2E)


@triton.jit(do_not_specialize=["rows", "length"])
def _sum_bands(
    query_rows,
    keys,
    values,
    flags,
    positions,
    bands,
    tops,
    sums,
    spreads,
    peaks,
    vectors,
    key_head,
    key_token,
    value_head,
    value_token,
    rows,
    length,
    scaling,
    softcap,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    VALUES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum over one band of keys for `ROWS` rows of a KV head: weighted values with VALUES, else spreads and peaks."""
    kind = values.dtype.element_ty
    tile, head, count = tl.program_id(0), tl.program_id(2), tl.num_programs(1)
    band = count - 1 - tl.program_id(1)  # wide ones first
    row, column, slot = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    real, wide = row < rows, column < dim
    position = tl.load(positions + row, real, other=-1)  # before every key, so no key is visible
    earliest = tl.load(positions + tile * ROWS)
    latest = tl.load(positions + tl.minimum(tile * ROWS + ROWS, rows) - 1)
    low, high = tl.load(bands + band * 4), tl.load(bands + band * 4 + 1)
    begin = tl.maximum(tl.load(bands + band * 4 + 2), earliest - high + 1)
    end = tl.minimum(tl.load(bands + band * 4 + 3), latest - low + 1)

    at = head.to(tl.int64) * rows + row
    query = tl.load(query_rows + at[:, None] * dim + column[None, :], real[:, None] & wide[None, :], other=0.0)
    keys += head.to(tl.int64) * key_head
    values += head.to(tl.int64) * value_head
    flags += head.to(tl.int64) * length
    top, peak = tl.full([ROWS], float("-inf"), tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    others, sinks = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    if VALUES:
        of_others, of_sinks = tl.zeros([ROWS, DIM], tl.float32), tl.zeros([ROWS, DIM], tl.float32)
    for first in tl.range(begin, end, TILE, num_stages=STAGES):
        in_band = first + slot < end
        inside = in_band[:, None] & wide[None, :]
        from_ = keys + tl.cast(first, tl.int64) * key_token
        key = tl.load(from_ + slot[:, None] * key_token + column[None, :], inside, other=0.0)
        sink = (tl.load(flags + first + slot, in_band, other=0) != 0)[None, :]
        age = position[:, None] - first - slot[None, :]
        seen = (age >= low) & (age < high) & in_band[None, :]
        raw = _logits(query, tl.trans(key), scaling, softcap, ROWS, TILE, CAPPED)
        logits = tl.where(seen, raw, float("-inf"))
        most = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(most == float("-inf"), 0.0, most)  # no key is visible yet: avoid inf - inf
        factor = tl.exp2(top - finite)
        shares = tl.exp2(logits - finite[:, None])
        at_sinks = tl.where(sink, shares, 0.0)
        elsewhere = tl.where(sink, 0.0, shares)
        others = others * factor + tl.sum(elsewhere, 1)
        sinks = sinks * factor + tl.sum(at_sinks, 1)
        if VALUES:
            from_ = values + tl.cast(first, tl.int64) * value_token
            value = tl.load(from_ + slot[:, None] * value_token + column[None, :], inside, other=0.0)
            of_others = product(elsewhere.to(kind), value, of_others * factor[:, None])
            of_sinks = product(at_sinks.to(kind), value, of_sinks * factor[:, None])
        else:
            spread = spread * factor + tl.sum(shares * raw, 1)
            peak = tl.maximum(peak, tl.max(tl.where(sink, float("-inf"), logits), 1))
        top = most

    at = at * count + band
    tl.store(tops + at, top, real)
    tl.store(sums + 2 * at, others, real)
    tl.store(sums + 2 * at + 1, sinks, real)
    if VALUES:
        at_row = 2 * at[:, None] * dim + column[None, :]
        tl.store(vectors + at_row, of_others, real[:, None] & wide[None, :])
        tl.store(vectors + at_row + dim, of_sinks, real[:, None] & wide[None, :])
    else:
        tl.store(spreads + at, spread, real)
        tl.store(peaks + at, peak, real)


@triton.jit(do_not_specialize=["rows", "length", "reach"])
def _sum_rows(
    query_rows,
    keys,
    positions,
    offsets,
    bounds,
    output,
    key_head,
    key_token,
    rows,
    length,
    reach,
    scaling,
    softcap,
    GROUP: tl.constexpr,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum the attention to each of `TILE` keys over the queries of one head."""
    tile, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(bounds + 2 * tile), tl.load(bounds + 2 * tile + 1)  # queries that see one of the keys
    keys += (head // GROUP).to(tl.int64) * key_head + (tile * TILE).to(tl.int64) * key_token
    of_head = (head // GROUP).to(tl.int64) * rows + head % GROUP
    column, some, near = tl.arange(0, DIM), tl.arange(0, ROWS), tl.arange(0, TILE)
    slot, wide = tile * TILE + near, column < dim
    valid = slot < length
    key = tl.load(keys + near[:, None] * key_token + column[None, :], valid[:, None] & wide[None, :], other=0.0)
    sum_ = tl.zeros([TILE], tl.float32)
    for first in tl.range(start, stop, ROWS, num_stages=STAGES):
        row = (first + some) * GROUP
        real = first + some < stop
        at_row = (of_head + row)[:, None] * dim + column[None, :]
        query = tl.load(query_rows + at_row, real[:, None] & wide[None, :], other=0.0)
        position = tl.load(positions + row, real, other=-1)  # before every key, so no key is visible
        offset = tl.load(offsets + of_head + row, real, other=0.0)
        age = position[None, :] - slot[:, None]
        logits = _logits(key, tl.trans(query), scaling, softcap, TILE, ROWS, CAPPED) + offset[None, :]
        sum_ += tl.sum(tl.where((age >= 0) & (age < reach), tl.exp2(logits), 0.0), 1)
    tl.store(output + head.to(tl.int64) * length + slot, sum_, valid)


class Band(NamedTuple):
    """Keys j with `begin` <= j < `end` and distance `low` <= i - j < `high` from query i."""

    low: int
    high: int
    begin: int
    end: int


class Sums(NamedTuple):
    """Sums per row and band. The rows of a KV head are all pairs of a query and a query head of its group.

    logarithm: float32 [KV heads, rows], log2 of the sum of exponentials. sink_logits: float32 [KV heads, rows], attention to
    the learned sink logit. weights: float32 [KV heads, rows, bands, 2], attention to ordinary keys and to sink keys. spread:
    float32 [KV heads, rows], mean logit x log2(e). peaks: float32 [KV heads, rows, bands], largest weight of an ordinary key.
    vectors: float32 [KV heads, rows, bands, 2, dim], weighted sums of values. Either `spread` and `peaks` or `vectors` are
    computed; the others are undefined.
    """

    logarithm: Tensor
    sink_logits: Tensor
    weights: Tensor
    spread: Tensor
    peaks: Tensor
    vectors: Tensor


class SampledQueries:
    """Sampled queries of a layer in the layout of the kernels.

    query: [KV heads, rows, dim], contiguous. positions: int32 [rows], ascending. reach: largest number of visible keys of a
    query.
    """

    def __init__(self, inputs: Inputs, rows: Tensor):
        self.inputs = inputs
        self.key, self.value = (t[0] if t.stride(3) == 1 else t[0].contiguous() for t in (inputs.key, inputs.value))
        kv_heads, self.length, self.dim = self.key.shape
        like = inputs.key.shape, inputs.key.dtype, inputs.key.device
        must_be("census: values", (inputs.value.shape, inputs.value.dtype, inputs.value.device), like)
        query = inputs.query.shape[0], inputs.query.shape[1] % kv_heads, *inputs.query.shape[2:], inputs.query.dtype
        must_be("census: queries", query, (1, 0, self.length, self.dim, self.key.dtype))
        self.group = inputs.query.shape[1] // kv_heads
        self.at, self.reach = rows, min(inputs.sliding or self.length, self.length)
        grouped = inputs.query[0][:, rows].view(kv_heads, self.group, len(rows), self.dim)
        self.query = grouped.transpose(1, 2).reshape(kv_heads, -1, self.dim).contiguous()
        self.positions = rows.to(torch.int32).repeat_interleave(self.group)
        wide, size = max(16, triton.next_power_of_2(self.dim)), self.key.element_size()
        self.tile = max(16, min(64, TILE_BYTES // (wide * size)))
        # Rows per product; exact float32 products need many registers.
        self.rows = 16 if size == 4 else min(64, TILE_BYTES // wide)
        self.same: dict[str, Any] = {
            "scaling": inputs.scaling,
            "softcap": 1.0 if inputs.softcap is None else inputs.softcap,
            "CAPPED": inputs.softcap is not None,
            "dim": self.dim,
            "DIM": wide,
            "STAGES": 3,
            "num_warps": 4,
        }

    def by_head(self, found: Tensor) -> Tensor:
        """Reshape [KV heads, rows, ...] to [query heads, queries, ...]."""
        return found.unflatten(1, (-1, self.group)).transpose(1, 2).flatten(0, 1)

    def cuts(self, distances: Sequence[int]) -> list[int]:
        """Return the distances at which bands are divided: `distances`, multiples of WIDEST, and the length."""
        return sorted({*distances, *range(0, self.length, WIDEST), self.length})

    def bands(self, cuts: list[int], begin: int = 0) -> list[Band]:
        """Return the bands between successive distances, of the keys from `begin` on."""
        return [
            Band(low, min(high, self.reach), begin, self.length if low < self.reach else 0)
            for low, high in pairwise(cuts)
        ]

    def start(self, end: int) -> Band:
        """Return the band of the first `end` keys."""
        return Band(0, self.reach, 0, end)

    def sums(self, bands: list[Band], parts: int, sinks: Tensor, values: bool = False) -> Sums:
        """Return sums over bands. The first `parts` bands contain each key once. sinks: bool [KV heads, keys]."""
        shape = (*self.query.shape[:2], len(bands))
        must_be("census: flags of sinks", (tuple(sinks.shape), sinks.is_contiguous()), (self.key.shape[:2], True))
        tops, spreads, peaks = (self.query.new_zeros(shape, dtype=torch.float32) for _ in range(3))
        sums = tops.new_empty(*shape, 2)
        vectors = tops.new_empty(*shape, 2, self.dim if values else 0)
        size = min(32, self.rows) if values else self.rows
        with torch.cuda.device_of(self.key):
            _sum_bands[(triton.cdiv(shape[1], size), shape[2], shape[0])](
                self.query,
                self.key,
                self.value,
                sinks.to(torch.int32),
                self.positions,
                torch.tensor(bands, dtype=torch.int32, device=self.key.device),
                tops,
                sums,
                spreads,
                peaks,
                vectors,
                *self.key.stride()[:2],
                *self.value.stride()[:2],
                shape[1],
                self.length,
                ROWS=size,
                TILE=self.tile,
                VALUES=values,
                **self.same,
            )
        most = tops[..., :parts].amax(-1, keepdim=True)
        scale = torch.exp2(tops - most)
        total = (sums.sum(-1) * scale)[..., :parts].sum(-1)
        logarithm = most[..., 0] + total.log2()
        sink_logits = torch.zeros_like(total)
        if self.inputs.sink_logits is not None:
            logits = self.inputs.sink_logits.float().view(shape[0], self.group).repeat(1, len(self.at))
            sink_logits = torch.sigmoid(logits - logarithm * LN2)
        factors = scale * ((1 - sink_logits) / total)[..., None]
        return Sums(
            logarithm,
            sink_logits,
            sums * factors[..., None],
            (spreads * scale)[..., :parts].sum(-1) / total,
            torch.exp2(peaks - logarithm[..., None]) * (1 - sink_logits)[..., None],
            vectors * factors[..., None, None],
        )

    def columns(self, found: Sums, share: Tensor) -> Tensor:
        """Return the attention to each key, summed over queries with weights `share`: float32 [query heads, keys]."""
        offsets = (share.repeat_interleave(self.group) * (1 - found.sink_logits)).log2() - found.logarithm
        output = found.logarithm.new_empty(self.inputs.query.shape[1], self.length)
        first = torch.arange(0, self.length, self.rows, device=self.key.device)
        bounds = torch.searchsorted(self.at, torch.stack([first, first + self.rows + self.reach - 1], -1))
        with torch.cuda.device_of(self.key):
            _sum_rows[(len(first), len(output))](
                self.query,
                self.key,
                self.positions,
                offsets,
                bounds.to(torch.int32),
                output,
                *self.key.stride()[:2],
                self.query.shape[1],
                self.length,
                self.reach,
                GROUP=self.group,
                ROWS=self.rows,
                TILE=self.rows,
                **self.same,
            )
        return output
