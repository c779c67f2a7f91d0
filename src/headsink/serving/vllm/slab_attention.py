"""Attention over the slab (slab.py) with vLLM's CPU kernels: one call per layer, in which every head of a sequence is a sequence.

Keys of a head that is below its capacity, and of one that has evicted, are in slots 0, 1, 2, ... of its pages. Their order does
not matter to attention, except that the newest tokens come last, so plain causal attention over a head's pages is right. A head
evicts in place: the newest keys move into the slots of evicted ones. Importance scores and positions of keys are in arrays that
are indexed by the slots of the whole pool, so nothing is stored per sequence.

A step reads its tokens in rounds. A round ends where a sequence reaches the next multiple of `EVICT_EVERY`, unless none of
its heads is full there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from headsink.errors import HeadsinkError
from headsink.eviction.scorers import Scorer
from headsink.serving.vllm.slab import EVICT_EVERY, Slab

PROTECTED = float("inf")  # score of keys that are not evicted


class Pool:
    """The memory of all sequences, as pages of one head.

    pages: [pages, elements of a page]. keys, values: as vLLM's kernels take them. scores, positions: float32 and int32 by slot.
    places: in which elements of a page a slot's key and value are, int64 [block, 2 x dim].
    """

    def __init__(self, layers: list[Any], block: int, isa: str):
        caches = [layer.kv_cache for layer in layers]
        like, heads = caches[0], caches[0].shape[1]
        dim = like.shape[3] // 2
        size = block * 2 * dim
        flat = torch.empty(0, dtype=like.dtype).set_(like.untyped_storage())
        self.pages = flat[: len(flat) // size * size].view(-1, size)
        self.keys, self.values = self.pages.view(-1, 1, 2 * block, dim).chunk(2, dim=2)
        slots = len(self.pages) * block
        self.scores, self.positions = torch.zeros(slots), torch.zeros(slots, dtype=torch.int32)
        self.block, self.heads, self.isa, self.dim = block, heads, isa, dim
        # page of a lane of block 0
        self.first = torch.tensor([cache.storage_offset() // size + head for cache in caches for head in range(heads)])
        if any(cache.storage_offset() % size or not cache[0].is_contiguous() for cache in caches):
            raise HeadsinkError("vLLM's KV cache has a layout that a plan with top-k keys does not support")
        self.places = self._probe(like.dtype)

    def _probe(self, dtype: torch.dtype) -> Tensor:
        """Find where the kernel puts the elements of a slot, by writing one page of known numbers for each element."""
        page = torch.zeros(1, 1, 2 * self.block, self.dim, dtype=dtype)
        keys, values = page.chunk(2, dim=2)
        places = torch.zeros(self.block, 2 * self.dim, dtype=torch.long)
        for element in range(2 * self.dim):
            page.zero_()
            given = torch.zeros(self.block, 1, 2 * self.dim, dtype=dtype)
            given[:, 0, element] = torch.arange(1, self.block + 1).to(dtype)  # exact in bfloat16 up to 256
            self._store(torch.arange(self.block), keys, values, *given.split(self.dim, -1))
            found = page.flatten().nonzero()[:, 0]
            places[page.flatten()[found].long() - 1, element] = found
        return places

    def _store(self, slots: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        ops.cpu_attn_reshape_and_cache(key.contiguous(), value.contiguous(), keys, values, slots, self.isa)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """key, value: [tokens, 1, dim]."""
        self._store(slots, self.keys, self.values, key, value)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Move keys between slots, int64 [keys]."""
        block = self.block
        given = self.pages[(source // block)[:, None], self.places[source % block]]
        self.pages[(target // block)[:, None], self.places[target % block]] = given
        self.scores[target], self.positions[target] = self.scores[source], self.positions[source]


@dataclass
class Round:
    """Tokens of a step that are read in one call.

    rows: which tokens of the step, int64 [tokens], None for all. positions: of the tokens, once for every head, int32 [KV heads x
    tokens]. tables, lengths: of every head of every sequence, int32 [layers, KV heads x sequences, pages] and [layers, KV heads x
    sequences]. slots: int64 [layers, KV heads, tokens]. starts: of the queries of each head and sequence, int32 [KV heads x
    sequences + 1]. evicting: for every layer, (index in `tables`, sink, window, capacity) of each full head, int64 [evicting, 4].
    length: tokens of every sequence before the round, int64 [sequences].
    """

    rows: Tensor | None
    positions: Tensor
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    starts: Tensor
    evicting: list[Tensor]
    length: Tensor


@dataclass
class SlabMetadata:
    """What the layers of a step get. pool: that of the worker."""

    pool: Pool
    rounds: list[Round]
    num_actual_tokens: int


def rounds(batch: CommonAttentionMetadata, slab: Slab, pool: Pool) -> list[Round]:
    """Divide the tokens of a step into rounds."""
    count = batch.num_reqs
    starts = batch.query_start_loc_cpu[: count + 1].long()
    assert batch.seq_lens_cpu_upper_bound is not None
    ends = batch.seq_lens_cpu_upper_bound[:count].long()  # exact, because speculative decoding is refused
    left = starts.diff()
    length = (ends - left).clamp(min=0)
    place, least = starts[:-1].clone(), int(slab.capacity.min())
    pages = pool.first[slab.lane]  # of block 0: [layers, heads, pages]
    found = []
    while bool((left > 0).any()):
        until = torch.where(length < least, least, (length // EVICT_EVERY + 1) * EVICT_EVERY)
        tokens = torch.minimum(left, until - length)
        who = (tokens > 0).nonzero()[:, 0]
        found.append(_round(batch.block_table_tensor, slab, pool, pages, who, length[who], tokens[who], place[who]))
        length, left, place = length + tokens, left - tokens, place + tokens
    if len(found) == 1 and found[0].slots.shape[2] == batch.num_actual_tokens:
        found[0].rows = None
    return found


def _round(
    table: Tensor, slab: Slab, pool: Pool, pages: Tensor, who: Tensor, length: Tensor, tokens: Tensor, place: Tensor
) -> Round:
    layers, heads, most = pages.shape
    blocks = table[who].long()  # [sequences, columns]
    used = blocks[:, slab.column.clamp(max=blocks.shape[1] - 1)].permute(
        1, 2, 0, 3
    )  # [layers, heads, sequences, pages]
    tables = used * pool.heads + pages[:, :, None]
    held = slab.held(length)
    # A full head that evicts now holds `EVICT_EVERY` keys fewer afterwards.
    evicts = (length % EVICT_EVERY == 0) & (length >= slab.capacity[..., None])
    owner = torch.repeat_interleave(torch.arange(len(who)), tokens)
    within = torch.arange(int(tokens.sum())) - (tokens.cumsum(0) - tokens)[owner]
    at = held[:, :, owner] + within  # [layers, heads, tokens]
    page = tables[:, :, owner].gather(3, (at // pool.block)[..., None].clamp(max=most - 1))[..., 0]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), tokens.repeat(heads).cumsum(0)])
    evicting = []
    for layer in range(layers):
        head, sequence = evicts[layer].nonzero(as_tuple=True)
        numbers = [slab.sink[layer, head], slab.window[layer, head], slab.capacity[layer, head]]
        evicting.append(torch.stack([head * len(who) + sequence, *numbers], 1))
    return Round(
        place[owner] + within,
        (length[owner] + within).int().repeat(heads),
        tables.flatten(1, 2).int(),
        (held + tokens).flatten(1).int(),
        page * pool.block + at % pool.block,
        starts.int(),
        evicting,
        length,
    )


def evict(pool: Pool, table: Tensor, chosen: Tensor, length: Tensor) -> None:
    """Evict the `EVICT_EVERY` keys of each full head with the lowest scores, and move the newest into their slots.

    table: int32 [heads x sequences, pages]. chosen: int64 [evicting, 4], as `Round.evicting`. length: int64 [sequences].
    """
    row, sink, window, capacity = chosen.T[..., None]
    at = torch.arange(int(capacity.max()))
    there = at < capacity  # [evicting, slots]
    page = table[row[:, 0]].long().gather(1, (at // pool.block).expand(len(chosen), -1))
    slots = page * pool.block + at % pool.block
    positions = pool.positions[slots]
    newest = length[row % len(length)]
    scores = pool.scores[slots].masked_fill((positions < sink) | (positions >= newest - window) | ~there, PROTECTED)
    gone = torch.zeros_like(there).scatter_(1, scores.argsort(dim=1, stable=True)[:, :EVICT_EVERY], True)
    last = there & (at >= capacity - EVICT_EVERY)
    pool.move(slots[last & ~gone], slots[gone & ~last])  # as many of both, row by row


@lru_cache
def over_slab(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """Return a subclass of vLLM's CPU backend for layers whose keys are in the slab."""
    if not issubclass(backend, CPUAttentionBackend):
        raise HeadsinkError(
            "a plan with top-k keys is served on CPUs only yet; make one with `headsink plan --no-top-k`"
        )
    base_builder: Any = backend.get_builder_cls()
    base_impl: Any = backend.get_impl_cls()

    class Builder(base_builder):  # type: ignore[misc]
        def __init__(self, spec: Any, layer_names: list[str], vllm_config: Any, *args: Any, **options: Any) -> None:
            super().__init__(spec, layer_names, vllm_config, *args, **options)
            context = vllm_config.compilation_config.static_forward_context
            self.layers = sorted((context[name] for name in layer_names), key=lambda layer: layer.number)
            self.pool: Pool | None = None

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            del common_prefix_len, fast_build
            slab = self.layers[0].slab
            if self.pool is None:
                self.pool = Pool(self.layers, slab.block, self.isa)
            return SlabMetadata(
                self.pool,
                rounds(common_attn_metadata, slab, self.pool),
                common_attn_metadata.num_actual_tokens,
            )

    class Impl(base_impl):  # type: ignore[misc]
        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: SlabMetadata | None,
            output: Tensor,
            *_: Any,
            **__: Any,
        ) -> Tensor:
            del kv_cache
            for one in () if attn_metadata is None else attn_metadata.rounds:
                assert attn_metadata is not None
                rows = slice(attn_metadata.num_actual_tokens) if one.rows is None else one.rows
                output[rows] = attend(
                    attn_metadata.pool, one, layer, query[rows], key[rows], value[rows], self.scale
                ).view(-1, *output.shape[1:])
            return output

    overrides = {
        "get_builder_cls": staticmethod(lambda: Builder),
        "get_impl_cls": staticmethod(lambda: Impl),
        "forward_includes_kv_cache_update": True,
    }
    return subclass_attention_backend_with_overrides("HeadsinkSlab", backend, overrides)


def attend(pool: Pool, one: Round, layer: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Evict, append the tokens of a round to all heads of a layer, and return their attention, as `query`.

    layer: with `number`, `scorer` and `scorer_weights`. query: [tokens, query heads, dim]; key, value: [tokens, KV heads, dim].
    """
    number, tokens, heads = layer.number, len(query), key.shape[1]
    table = one.tables[number]
    if len(one.evicting[number]):
        evict(pool, table, one.evicting[number], one.length)
    slots = one.slots[number].flatten()
    keys, values = (t.transpose(0, 1).contiguous() for t in (key, value))  # [heads, tokens, dim]
    pool.write(keys.view(-1, 1, pool.dim), values.view(-1, 1, pool.dim), slots)
    scorer: Scorer = layer.scorer
    pool.scores[slots] = scorer.scores(keys, values, layer.scorer_weights).flatten().float()
    pool.positions[slots] = one.positions
    grouped = query.view(tokens, heads, -1, pool.dim).transpose(0, 1).contiguous()
    flat = grouped.view(heads * tokens, -1, pool.dim)
    found, lengths = torch.empty_like(flat), one.lengths[number]
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=flat.shape[1],
        num_kv_heads=1,
        head_dim=pool.dim,
        seq_lens=lengths,
        dtype=flat.dtype,
        query_start_loc=one.starts,
        causal=True,
        sliding_window_size=-1,
        isa=pool.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
    )
    ops.cpu_attention_with_kv_cache(
        query=flat,
        key_cache=pool.keys,
        value_cache=pool.values,
        output=found,
        query_start_loc=one.starts,
        seq_lens=lengths,
        scale=scaling,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
        softcap=0,
        scheduler_metadata=plan,
        s_aux=None,
    )
    return found.view(heads, tokens, -1, pool.dim).transpose(0, 1).flatten(1, 2)
