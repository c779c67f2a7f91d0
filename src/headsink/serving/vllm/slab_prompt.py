"""Prompts in the slab (slab.py): read in full attention, then compressed as by `headsink.compress`.

A layer compresses a prompt right after its own attention to it. The linear scores and the prompt scores of all keys choose
which ones stay, and the reference queries refit them (eviction/refitting.py). A prompt may come in several chunks. Of earlier
chunks, keys and values are in the blocks for the prompt, prompt scores in the pool's scores, and the few queries that later
chunks need in `Chunks`. A chunk that reaches the end of a prompt needs no such blocks.

If the pool has 8-bit floats, keys and values are rounded before the attention, so that chunks make no difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headsink.attention.params import AttentionParams
from headsink.eviction.pattern import FULL, Pattern
from headsink.eviction.refitting import refit_keys, stride
from headsink.eviction.scorers import ALWAYS
from headsink.eviction.scorers.prompt import AFTER, BEFORE, LEAST, STRIDE, join_scores, nearby_shares
from headsink.serving.vllm.slab import Slab
from headsink.serving.vllm.slab_pool import Chunks, Pool
from headsink.utils import flash


@dataclass
class Part:
    """Tokens of a prompt that are read in one step.

    rows: which tokens of the step. begin, end: their positions; prompt: tokens of the whole prompt. first: the first block of the
    sequence. earlier, these: slots of the prompt's tokens before `begin`, and of these tokens, int64 [layers, KV heads, tokens];
    `these` is empty if the prompt ends here. kept: slots of the keys that heads may keep, int64 [layers, KV heads, keys]; empty
    unless the prompt ends here.
    """

    rows: slice
    begin: int
    end: int
    prompt: int
    first: int
    earlier: Tensor
    these: Tensor
    kept: Tensor


def read(
    pool: Pool,
    part: Part,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """Return the attention of tokens of a prompt, as `query`. If the prompt ends with them, compress it.

    layer: a `SlabAttention`. query: [tokens, query heads, dim]; key, value: [tokens, KV heads, dim]. sink_logits: float [query
    heads], learned logits in the softmax without a value (gpt-oss), or None.
    """
    own_query, key, value = (t.transpose(0, 1) for t in (query, pool.rounded(key), pool.rounded(value)))
    begin, number = part.begin, layer.number
    if begin:
        cached = pool.decode(pool.rows[part.earlier[number]])
        key, value = (torch.cat(pair, 1) for pair in zip(cached.chunk(2, -1), (key, value), strict=True))
    output, lse = _attend(own_query, key, value, begin, scaling)
    if sink_logits is not None:
        total = torch.logaddexp(lse, sink_logits[:, None])
        output, lse = (output.float() * (lse - total).exp()[..., None]).to(query.dtype), total
    before = pool.reading.pop(number, part.first) if begin else None
    softmax = AttentionParams(scaling, None, sink_logits)
    near = None
    if layer.rotary is not None and part.prompt >= LEAST and (not begin or before is not None):
        chunks = _with_queries(before, own_query, lse, part, len(own_query) // len(key))
        first = max(begin - BEFORE - AFTER, 0)
        at = (part.end - 1) // STRIDE * STRIDE - (chunks.last.shape[1] - 1) * STRIDE  # the position of the first query
        given = chunks.last, chunks.last_lse, at, key[:, first:], first, part.prompt, softmax, layer.rotary
        near = first, nearby_shares(*given), chunks
    if part.end < part.prompt:
        these = part.these[number]
        pool.rows[these] = pool.encode(torch.cat([key[:, begin:], value[:, begin:]], -1))
        if near is not None:
            _keep_shares(pool, part, number, *near)
    else:
        _compress(pool, part, layer, key, value, near, softmax)
    return output.transpose(0, 1)


def _with_queries(before: Chunks | None, query: Tensor, lse: Tensor, part: Part, group: int) -> Chunks:
    """Return the queries of a chunk, after those of earlier chunks that are still needed."""
    some = slice(part.begin % STRIDE, None, STRIDE)
    step = stride(group, part.prompt)
    found = query[:, some], lse[:, some], query[:, -part.begin % step :: step]
    if before is None:
        return Chunks(*found)
    kept = (before.last, before.last_lse, before.reference)
    return Chunks(*(torch.cat(pair, 1) for pair in zip(kept, found, strict=True)))


def _keep_shares(pool: Pool, part: Part, number: int, first: int, shares: Tensor, chunks: Chunks) -> None:
    """Keep what the next chunk of a prompt needs."""
    slots = torch.cat([part.earlier[number], part.these[number]], 1)[:, first:]
    old = pool.scores[slots[:, : part.begin - first]]
    shares[:, : part.begin - first] = shares[:, : part.begin - first].maximum(old)
    pool.scores[slots] = shares
    last = BEFORE // STRIDE
    # Copies, since a view would keep all queries of the step.
    kept = Chunks(chunks.last[:, -last:].clone(), chunks.last_lse[:, -last:].clone(), chunks.reference.clone())
    pool.reading.put(number, part.first, kept)


def _compress(
    pool: Pool,
    part: Part,
    layer: Any,
    key: Tensor,
    value: Tensor,
    near: tuple[int, Tensor, Chunks] | None,
    softmax: AttentionParams,
) -> None:
    """Evict from a whole prompt, key and value [KV heads, tokens, dim], and write what is kept."""
    number, tokens, slab = layer.number, part.prompt, layer.slab
    scores = layer.scorer.scores(key, value, layer.scorer_weights).float()
    own = scores
    if near is not None:
        first, shares, chunks = near
        known = pool.scores[part.earlier[number]]
        shares = torch.cat([known[:, :first], shares], 1)
        shares[:, first : part.begin] = shares[:, first : part.begin].maximum(known[:, first:])
        own = join_scores(shares, scores)
        reference = chunks.reference.unflatten(0, (len(key), -1))
    patterns = [_pattern(slab, number, head, tokens) for head in range(len(key))]
    refitted = {}
    if near is not None and (heads := [head for head, pattern in enumerate(patterns) if pattern.top_k]):
        given = reference[heads], key[heads], value[heads], own[heads], [patterns[head] for head in heads]
        refitted = dict(zip(heads, refit_keys(*given, softmax.of(heads, len(key)), layer.rotary), strict=True))
    slots, keys, values, ranks, positions = [], [], [], [], []
    columns = torch.arange(tokens)
    for head, pattern in enumerate(patterns):
        mine, kept, rank = (key[head], value[head]), columns, scores[head]
        if pattern.window is not None:
            sink, end, rank = pattern.sink, tokens - pattern.window, own[head]
            if head in refitted:
                best, new_key, new_value = refitted[head]
                mine = mine[0].index_copy(0, best, new_key.to(key)), mine[1].index_copy(0, best, new_value.to(value))
                if len(best) > 1:
                    rank = rank.index_fill(0, best[-1:], ALWAYS)
            else:
                best = rank[sink:end].topk(pattern.top_k).indices + sink
            kept = torch.cat([columns[:sink], best, columns[end:]])
            rank = torch.cat([rank[:end], scores[head, end:]])  # keys in the window have not been ranked
        slots.append(part.kept[number, head, : len(kept)])
        keys.append(mine[0][kept])
        values.append(mine[1][kept])
        ranks.append(rank[kept])
        positions.append(kept)
    into = torch.cat(slots)
    pool.write(torch.cat(keys)[:, None], torch.cat(values)[:, None], into)
    pool.scores[into], pool.positions[into] = torch.cat(ranks), torch.cat(positions).int()


def _pattern(slab: Slab, layer: int, head: int, tokens: int) -> Pattern:
    """Return what a head keeps of a prompt."""
    keeps, sink, window = (int(of[layer, head]) for of in (slab.keeps, slab.sink, slab.window))
    return FULL if keeps >= tokens else Pattern(sink, keeps - sink - window, window)


def _attend(query: Tensor, key: Tensor, value: Tensor, begin: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Attend from the tokens of a prompt from `begin` on, [query heads, tokens, dim]. Returns output and log-sum-exp."""
    if not flash.has_kernel(query):
        output, lse = _attend(query.float(), key.float(), value.float(), begin, scaling)
        return output.to(query.dtype), lse
    output, lse = flash.attend(query[None], key[None, :, begin:], value[None, :, begin:], scaling)
    if not begin:
        return output[0], lse[0]
    other, other_lse = flash.attend(query[None], key[None, :, :begin], value[None, :, :begin], scaling, is_causal=False)
    total = torch.logaddexp(lse, other_lse)
    found = output.float() * (lse - total).exp()[..., None] + other.float() * (other_lse - total).exp()[..., None]
    return found[0].to(query.dtype), total[0]
