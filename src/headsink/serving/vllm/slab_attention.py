"""Attention over the slab (slab.py) with vLLM's CPU kernels: one call per layer, in which every head of a sequence is a sequence.

The order of a head's keys does not matter to attention, except that the newest tokens come last, so plain causal attention over
its pages is right. Tokens of prompts are read apart (slab_prompt.py). Other tokens of a step are read in rounds. A round ends
where a sequence evicts next. The kernel takes one set of learned sink logits per call (gpt-oss), so layers that have them call it
once per KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from headsink.serving.vllm.prefixes import Prefix
from headsink.serving.vllm.slab import EVICT_EVERY, Slab
from headsink.serving.vllm.slab_pool import Pool, evict
from headsink.serving.vllm.slab_prompt import Part, read


@dataclass
class Round:
    """Tokens of a step that are read in one call.

    rows: which tokens of the step, int64 [tokens], None for all. tables, lengths: of every head of every sequence, int32 [layers,
    KV heads x sequences, pages] and [layers, KV heads x sequences]. slots: int64 [layers, KV heads, tokens]. starts: of the
    queries of each head and sequence, int32 [KV heads x sequences + 1]. evicting: the heads that evict before the round: layer,
    index in `tables`, and what `evict` takes, int64 [evicting, 8]. All are contiguous: vLLM's kernels do not look at strides.
    """

    rows: Tensor | None
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    starts: Tensor
    evicting: Tensor


class Tables:
    """The pages of the sequences of a step. They are kept for the next step, which mostly has the same.

    weights: scorer weights of all heads, [layers, KV heads, features]. prefixes: from which sequences may start.
    """

    def __init__(
        self, slab: Slab, pool: Pool, scorer: Scorer, weights: Tensor, prefixes: Sequence[Prefix] = ()
    ) -> None:
        self.slab, self.pool, self.scorer, self.weights, self.prefixes = slab, pool, scorer, weights, prefixes
        self.begins = torch.tensor([0, *(prefix.tokens for prefix in prefixes)])
        self.missing = torch.stack([torch.zeros_like(slab.keeps), *(prefix.missing for prefix in prefixes)])
        self.pages = pool.first[slab.lane]  # of block 0: [layers, KV heads, pages]
        self.lanes = pool.first.view(*slab.keeps.shape, 1)  # the same, of a prompt that is being read
        self.needs = torch.tensor(slab.needs)
        self.known: tuple[Tensor, Tensor, Tensor] | None = None
        self.found = torch.empty(0)

    def of(self, blocks: Tensor, prompt: Tensor) -> Tensor:
        """Return the pages of all heads, int32 [layers, KV heads, sequences, pages].

        blocks: of every sequence, int [sequences, columns]; prompt: tokens that were read in full attention, int64 [sequences].
        """
        skipped = self.pool.skipped[blocks[:, 0].long()]
        given = blocks, prompt, skipped
        if self.known is None or not all(map(torch.equal, self.known, given)):
            self.known = blocks.clone(), prompt.clone(), skipped
            self.found = self.compute(blocks, prompt, skipped)
        return self.found

    def compute(self, blocks: Tensor, prompt: Tensor, skipped: Tensor) -> Tensor:
        column = self.slab.column[..., None].expand(*self.slab.column.shape, len(prompt))
        column = column + torch.where(column >= self.at_prompt(prompt), skipped, 0)
        column = column.clamp(max=blocks.shape[1] - 1).permute(3, 0, 1, 2)
        used = blocks.long().gather(1, column.flatten(1)).view(column.shape)
        return (used * self.pool.heads + self.pages).permute(1, 2, 0, 3).int().contiguous()

    def evict(self, one: Round, layer: int | None = None) -> None:
        """Let heads evict before a round, those of one layer or of all."""
        chosen = one.evicting if layer is None else one.evicting[one.evicting[:, 0] == layer]
        if len(chosen):
            number, row = chosen[:, 0], chosen[:, 1]
            head = row // (one.tables.shape[1] // self.weights.shape[1])
            evict(self.pool, self.scorer, self.weights[number, head], one.tables[number, row], chosen[:, 2:])

    def load(self, blocks: Tensor, number: int) -> None:
        """Write a prefix into the blocks of a sequence, int [columns]. number: of the prefix, counted from 1."""
        pool, prefix, first = self.pool, self.prefixes[number - 1], int(blocks[0])
        pool.prefix[first], pool.skipped[first] = number, 0
        pages = self.compute(blocks[None], self.begins[number : number + 1], pool.skipped[first : first + 1])[:, :, 0]
        layer, head, at = prefix.place.T
        slots = pages[layer, head, at // pool.block].long() * pool.block + at % pool.block
        pool.write(prefix.keys[:, None], prefix.values[:, None], slots)
        pool.scores[slots], pool.positions[slots] = prefix.scores, prefix.positions

    def prefix_of(self, blocks: Tensor, length: Tensor) -> Tensor:
        """Return from which prefix each sequence started, int64 [sequences], 0 for none. length: tokens before the step."""
        first = blocks[:, 0].long()
        self.pool.prefix[first[length == 0]] = 0  # their blocks belonged to other sequences
        return self.pool.prefix[first]

    def at_prompt(self, prompt: Tensor) -> Tensor:
        """Return the number of blocks of sequences at the end of their prompt. prompt: int64 [sequences]."""
        return (prompt[:, None] > self.needs).sum(1)

    def slots(self, pages: Tensor, count: int, begin: int = 0) -> Tensor:
        """Return the slots of keys `begin` to `count` of heads. pages: int [..., pages]. Returns int64 [..., keys]."""
        at = torch.arange(begin, count)
        return pages[..., at // self.pool.block].long() * self.pool.block + at % self.pool.block


@dataclass
class SlabMetadata:
    """What the layers of a step get. Evictions before the first round are done."""

    tables: Tables
    parts: list[Part]
    rounds: list[Round]
    num_actual_tokens: int


def divide(batch: CommonAttentionMetadata, tables: Tables, dense: bool) -> tuple[list[Part], list[Round]]:
    """Divide the tokens of a step into parts of prompts, and rounds of other tokens."""
    slab, count = tables.slab, batch.num_reqs
    starts = batch.query_start_loc_cpu[: count + 1].long()
    assert batch.seq_lens_cpu_upper_bound is not None
    ends = batch.seq_lens_cpu_upper_bound[:count].long()  # exact, because speculative decoding is refused
    left = starts.diff()
    length, place, blocks = (ends - left).clamp(min=0), starts[:-1].clone(), batch.block_table_tensor[:count]
    prefix = tables.prefix_of(blocks, length)
    prompt = tables.begins[prefix]
    parts, rounds = [], []
    if dense:
        assert batch.rswa_prefix_lens is not None
        prompt = torch.where(prefix > 0, prompt, batch.rswa_prefix_lens[:count].long())
        tokens = (prompt - length).clamp(min=0).minimum(left)
        for row in tokens.nonzero()[:, 0].tolist():
            given = (int(of[row]) for of in (place, length, tokens, prompt))
            parts.append(_part(tables, blocks[row], *given))
        length, left, place = length + tokens, left - tokens, place + tokens
    missing = tables.missing[prefix].permute(1, 2, 0).contiguous()
    while bool((left > 0).any()):
        tokens = torch.minimum(left, slab.next_eviction(length, prompt) - length)
        who = (tokens > 0).nonzero()[:, 0]
        some = slice(None) if len(who) == count else who
        rounds.append(
            _round(tables, missing[..., some], blocks[some], prompt[some], length[some], tokens[some], place[some])
        )
        length, left, place = length + tokens, left - tokens, place + tokens
    if not parts and len(rounds) == 1 and rounds[0].slots.shape[2] == batch.num_actual_tokens:
        rounds[0].rows = None
    return parts, rounds


def _part(tables: Tables, blocks: Tensor, place: int, begin: int, tokens: int, prompt: int) -> Part:
    """Return tokens of the prompt of a sequence. blocks: int [columns]. place: of the first of them in the step."""
    slab, pool, end, first = tables.slab, tables.pool, begin + tokens, int(blocks[0])
    length = torch.tensor([prompt])
    at = int(tables.at_prompt(length))
    pages = blocks[at : at - -end // pool.block].long() * pool.heads + tables.lanes  # [layers, KV heads, pages]
    ends_here, nothing = end == prompt, torch.empty(*tables.lanes.shape[:2], 0, dtype=torch.long)
    these, kept = nothing if ends_here else tables.slots(pages, end, begin), nothing
    if ends_here:
        pool.skipped[first] = -(-begin // pool.block)
        keys = min(prompt, int(slab.keeps.max()))
        own = tables.compute(blocks[None], length, pool.skipped[first : first + 1])[:, :, 0]
        kept = tables.slots(own, min(keys, own.shape[2] * pool.block))
    return Part(slice(place, place + tokens), begin, end, prompt, first, tables.slots(pages, begin), these, kept)


def _round(
    tables: Tables, missing: Tensor, blocks: Tensor, prompt: Tensor, length: Tensor, tokens: Tensor, place: Tensor
) -> Round:
    slab, block, heads = tables.slab, tables.pool.block, tables.slab.keeps.shape[1]
    pages = tables.of(blocks, prompt)
    held, evicted = slab.held(length, prompt, missing)
    owner = torch.repeat_interleave(torch.arange(len(tokens)), tokens)
    within = torch.arange(len(owner)) - (tokens.cumsum(0) - tokens)[owner]
    at = (held - evicted)[:, :, owner] + within  # [layers, KV heads, tokens]
    page = pages[:, :, owner].gather(3, (at // block)[..., None].clamp(max=pages.shape[3] - 1))[..., 0]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), tokens.repeat(heads).cumsum(0)])
    return Round(
        place[owner] + within,
        pages.flatten(1, 2),
        (held - evicted + tokens).flatten(1).int().contiguous(),
        (page.long() * block + at % block).contiguous(),
        starts.int(),
        _evicting(slab, held, evicted, length, prompt, missing),
    )


def _evicting(slab: Slab, held: Tensor, evicted: Tensor, length: Tensor, prompt: Tensor, missing: Tensor) -> Tensor:
    """Return `Round.evicting`. held, evicted: as from `Slab.held`, with the same arguments."""
    layer, head, sequence = evicted.nonzero(as_tuple=True)
    keeps, tokens, less = slab.keeps[layer, head], length[sequence], missing[layer, head, sequence]
    scored = torch.where(tokens - less - EVICT_EVERY > keeps, keeps, prompt[sequence] - less)
    numbers = held[layer, head, sequence], scored, evicted[layer, head, sequence]
    own = slab.sink[layer, head], slab.window[layer, head], tokens, *numbers
    return torch.stack([layer, head * len(length) + sequence, *own], 1)


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
            self.sequences = vllm_config.scheduler_config.max_num_seqs
            self.tables: Tables | None = None

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            del common_prefix_len, fast_build
            if self.tables is None:
                slab = self.layers[0].slab
                pool = Pool(self.layers, slab.block, self.isa, self.sequences, self.dtype)
                weights = torch.stack([layer.scorer_weights for layer in self.layers])
                self.tables = Tables(slab, pool, self.layers[0].scorer, weights, self.layers[0].running.prefixes)
            self._load(self.tables, common_attn_metadata.block_table_tensor)
            parts, rounds = divide(common_attn_metadata, self.tables, self.kv_cache_spec.dense)
            if rounds:
                self.tables.evict(rounds[0])
            return SlabMetadata(self.tables, parts, rounds, common_attn_metadata.num_actual_tokens)

        def _load(self, tables: Tables, blocks: Tensor) -> None:
            """Write the prefixes of sequences that start in this step (connector.py)."""
            loads = self.layers[0].running.loads
            if loads:
                rows = {first: row for row, first in enumerate(blocks[:, 0].tolist())}
                for first, number in loads:
                    tables.load(blocks[rows[first]], number)
                loads.clear()

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
            if attn_metadata is None:  # a run that measures memory
                return output
            tables, shaped = attn_metadata.tables, output.view(*query.shape)
            softmax = self.scale, None if self.sinks is None else self.sinks.float()
            for part in attn_metadata.parts:
                these = part.rows
                shaped[these] = read(tables.pool, part, layer, query[these], key[these], value[these], *softmax)
            for number, one in enumerate(attn_metadata.rounds):
                if number:
                    tables.evict(one, layer.number)
                rows = slice(attn_metadata.num_actual_tokens) if one.rows is None else one.rows
                shaped[rows] = attend(tables.pool, one, layer.number, query[rows], key[rows], value[rows], *softmax)
            return output

    overrides = {
        "get_builder_cls": staticmethod(lambda: Builder),
        "get_impl_cls": staticmethod(lambda: Impl),
        "forward_includes_kv_cache_update": True,
    }
    return subclass_attention_backend_with_overrides("HeadsinkSlab", backend, overrides)


def attend(
    pool: Pool,
    one: Round,
    number: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """Append the tokens of a round to all heads of a layer, and return their attention, as `query`.

    number: of the layer. query: [tokens, query heads, dim]; key, value: [tokens, KV heads, dim]. sink_logits: as for `read`.
    """
    tokens, heads = len(query), key.shape[1]
    keys, values = (t.transpose(0, 1).reshape(heads * tokens, 1, pool.dim) for t in (key, value))
    pool.write(keys, values, one.slots[number].flatten())
    grouped = query.view(tokens, heads, -1, pool.dim).transpose(0, 1).contiguous()
    flat = grouped.view(heads * tokens, -1, pool.dim)
    found = torch.empty_like(flat)
    calls = 1 if sink_logits is None else heads
    parts = (given.chunk(calls) for given in (flat, found, one.lengths[number], one.tables[number]))
    logits = [None] if sink_logits is None else sink_logits.chunk(heads)
    for given, output, lengths, table, own_logits in zip(*parts, logits, strict=True):
        starts = one.starts[: len(lengths) + 1]
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=given.shape[1],
            num_kv_heads=1,
            head_dim=pool.dim,
            seq_lens=lengths,
            dtype=given.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=pool.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=pool.cache_dtype,
        )
        ops.cpu_attention_with_kv_cache(
            query=given,
            key_cache=pool.keys,
            value_cache=pool.values,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=scaling,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=own_logits,
            kv_cache_dtype=pool.cache_dtype,
        )
    return found.view(heads, tokens, -1, pool.dim).transpose(0, 1).flatten(1, 2)
