"""The memory of the slab (slab.py) in a vLLM worker, and eviction in it.

Keys of a head are in slots 0, 1, 2, ... of its pages. A head evicts in place: the newest keys move into the slots of evicted
ones. Importance scores and positions of keys are in arrays that are indexed by the slots of the whole pool, so nothing is stored
per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from headsink.errors import HeadsinkError
from headsink.eviction.scorers import Scorer
from headsink.serving.vllm import fp8

PROTECTED = float("inf")  # score of keys that are not evicted
LAYOUT = "vLLM's KV cache has a layout that a plan with top-k keys does not support"


@dataclass
class Chunks:
    """Queries of earlier chunks of a prompt in one layer.

    last, last_lse: queries of the last tokens and their log-sum-exp, for prompt scores of the next keys, [query heads, queries,
    dim] and [query heads, queries]. reference: reference queries, [query heads, queries, dim].
    """

    last: Tensor
    last_lse: Tensor
    reference: Tensor


class Reading:
    """The `Chunks` of the prompts that are being read, by layer and by the first block of the sequence.

    A sequence has its first block for itself, and overwrites what another one has left there. most: sequences at once. A prompt
    whose chunks are gone is compressed by the linear scores.
    """

    def __init__(self, most: int) -> None:
        self.most, self.found = most, dict[tuple[int, int], Chunks]()

    def pop(self, layer: int, first: int) -> Chunks | None:
        return self.found.pop((layer, first), None)

    def put(self, layer: int, first: int, chunks: Chunks) -> None:
        """Keep the chunks of a sequence, for the sequences that were read last: a request may have been aborted."""
        mine = [key for key in self.found if key[0] == layer]
        for key in mine[: max(0, len(mine) + 1 - self.most)]:
            del self.found[key]
        self.found[layer, first] = chunks


class Pool:
    """The memory of all sequences, as pages of one head.

    pages: [pages, elements of a page]. keys, values: as vLLM's kernels take them. rows: the same memory, as key and value of
    each slot, [slots, 2 x dim], for prompts that are being read. scores, positions: float32 and int32 by slot. places: in which
    elements of a page a slot's key and value are, int64 [block, 2 x dim]. skipped, prefix: how many blocks for its prompt a
    sequence had, and from which prefix it started, counted from 1, int64 by its first block. reading: see there. dtype: of keys
    and values outside of the pool. cache_dtype: vLLM's name of that in the pool.
    """

    def __init__(self, layers: list[Any], block: int, isa: str, sequences: int, dtype: torch.dtype) -> None:
        self.dtype, self.cache_dtype = dtype, layers[0].kv_cache_dtype
        caches = [layer.kv_cache for layer in layers]
        like, heads = caches[0], caches[0].shape[1]
        dim = like.shape[3] // 2
        size = block * 2 * dim
        flat = torch.empty(0, dtype=like.dtype).set_(like.untyped_storage())
        self.pages = flat[: len(flat) // size * size].view(-1, size)
        self.keys, self.values = self.pages.view(-1, 1, 2 * block, dim).chunk(2, dim=2)
        self.rows = self.pages.view(-1, 2 * dim)
        slots = len(self.pages) * block
        self.scores, self.positions = torch.zeros(slots), torch.zeros(slots, dtype=torch.int32)
        self.block, self.heads, self.isa, self.dim = block, heads, isa, dim
        self.skipped, self.prefix = torch.zeros(2, len(like), dtype=torch.long)
        self.reading = Reading(sequences)
        # page of a lane of block 0
        self.first = torch.tensor([cache.storage_offset() // size + head for cache in caches for head in range(heads)])
        if any(cache.storage_offset() % size or not cache[0].is_contiguous() for cache in caches):
            raise HeadsinkError(LAYOUT)
        self.places = self._probe()

    def _probe(self) -> Tensor:
        """Find where the kernel puts the elements of a slot, by writing pages with the bits of the elements' numbers."""
        count = self.block * 2 * self.dim
        page = torch.zeros(1, 1, 2 * self.block, self.dim, dtype=self.pages.dtype)
        number, found = torch.arange(count).view(self.block, 1, -1), torch.zeros(count, dtype=torch.long)
        for bit in range(count.bit_length()):
            given = (number >> bit & 1).to(self.dtype)
            self._store(torch.arange(self.block), *page.chunk(2, dim=2), *given.split(self.dim, -1))
            found += (page.flatten() != 0).long() << bit
        numbers, places = found.sort()
        if not torch.equal(numbers, torch.arange(count)):
            raise HeadsinkError(LAYOUT)
        return places.view(self.block, -1)

    def _store(self, slots: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        given = key.contiguous(), value.contiguous()
        ops.cpu_attn_reshape_and_cache(*given, keys, values, slots, self.isa, kv_cache_dtype=self.cache_dtype)

    def encode(self, numbers: Tensor) -> Tensor:
        """Return keys or values as the pool stores them."""
        return fp8.encode(numbers, self.cache_dtype)

    def decode(self, stored: Tensor) -> Tensor:
        """Return keys or values of the pool in the dtype outside of it."""
        return fp8.decode(stored, self.cache_dtype, self.dtype)

    def rounded(self, numbers: Tensor) -> Tensor:
        """Return keys or values as they come out of the pool."""
        return fp8.rounded(numbers, self.cache_dtype)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """key, value: [tokens, 1, dim]."""
        self._store(slots, self.keys, self.values, self.rounded(key), self.rounded(value))

    def _stored(self, slots: Tensor) -> Tensor:
        return self.pages[(slots // self.block)[:, None], self.places[slots % self.block]]

    def read(self, slots: Tensor) -> Tensor:
        """Return keys and values of slots, int64 [keys]: [keys, 2 x dim]."""
        return self.decode(self._stored(slots))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Move keys between slots, int64 [keys]."""
        self.pages[(target // self.block)[:, None], self.places[target % self.block]] = self._stored(source)
        self.scores[target], self.positions[target] = self.scores[source], self.positions[source]


def evict(pool: Pool, scorer: Scorer, weights: Tensor, table: Tensor, chosen: Tensor) -> None:
    """Evict the keys with the lowest scores of some heads of sequences, and move the newest into their slots.

    Keys that came after the last eviction get their scores here. weights: scorer weights of each of these heads, [evicting,
    features]. table: their pages, int32 [evicting, pages]. chosen: int64 [evicting, 6], sink, window, tokens of the sequence,
    keys, keys with a score, and keys to evict.
    """
    sink, window, newest, held, scored, count = chosen.T[..., None]
    at = torch.arange(int(held.max()))
    there = at < held  # [evicting, slots]
    slots = table.long()[:, at // pool.block] * pool.block + at % pool.block
    new = there & (at >= scored)
    key, value = pool.read(slots[new])[:, None].chunk(2, -1)
    pool.scores[slots[new]] = scorer.scores(key, value, weights[new.nonzero()[:, 0]])[:, 0].float()
    pool.positions[slots[new]] = (newest - held + at)[new].int()
    positions = pool.positions[slots]
    scores = pool.scores[slots].masked_fill((positions < sink) | (positions >= newest - window) | ~there, PROTECTED)
    most = int(count.max())
    lowest = scores.topk(most, largest=False).indices  # in order
    gone = torch.zeros_like(there).scatter_(1, lowest, torch.arange(most) < count)
    last = there & (at >= held - count)
    pool.move(slots[last & ~gone], slots[gone & ~last])  # as many of both, row by row
