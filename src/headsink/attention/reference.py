"""Reference attention: a plan's rule as a mask and plain softmax attention. Every backend is tested against it.

A text is divided into segments. The queries of a segment attend, causally, to every cached key and to the segment. Then each
KV head evicts: it keeps its `sink` initial tokens, the last `window` tokens and, of all other keys that it holds, the
`top_k` with the highest importance scores. After the first segment, if it has prompt scores, its top-k keys are refitted.
While decoding a segment is one token, and the head evicts before that token attends, so that it never holds more than the
pattern, whose window is then at least the plan's `decode_window`.

With another `kv_dtype` than the model's, keys and values are rounded when they enter the cache: the queries of a segment of
several tokens see its own keys as they were before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from headsink.attention.formats import KVDtype, decode, encode
from headsink.eviction.pattern import Pattern
from headsink.eviction.refitting import KEY_RIDGE, MASS_STRIDE, RIDGE, ROWS
from headsink.eviction.scorers import ALWAYS, LINEAR, NONE, Scorer
from headsink.eviction.scorers.prompt import AHEAD, LEAST, Softmax, segment_scores
from headsink.models.rope import Rotary, rotate


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: Sequence[Pattern],
    weights: Tensor,
    scaling: float,
    padding: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    scorer: Scorer = LINEAR,
    segments: Sequence[int] | None = None,
    rotary: Rotary | None = None,
    frozen: int | None = None,
    decode_window: int = 0,
    scoring: Tensor | None = None,
    kv_dtype: KVDtype = "auto",
) -> Tensor:
    """Return the attention of a text under one pattern per KV head.

    query: [batch, query heads, tokens, dim]. key, value: [batch, KV heads, tokens, dim]. weights: scorer weights, [KV heads,
    features] (eviction/scorers). padding: int [batch], tokens of left padding. softcap, sink_logits: as for `masked_attention`.
    segments: number of columns of each segment; None: one token each, as in sparse prefill and decoding. rotary: how queries are
    rotated, for prompt scores; None: the scorer alone. frozen: the column from which on nothing is evicted. decode_window: the
    window at least after segments of one token. scoring: the queries of the layer whose keys these are, if it is another one:
    they give the prompt scores. kv_dtype: of cached keys and values. Returns [batch, query heads, tokens, dim] in the
    query's dtype; zero where a query sees no key.
    """
    batch, kv_heads, tokens, _ = key.shape
    softmax, scoring = (scaling, softcap, sink_logits), query if scoring is None else scoring
    group = query.shape[1] // kv_heads
    offsets = torch.zeros(batch, dtype=torch.long, device=key.device) if padding is None else padding
    positions = torch.arange(tokens, device=key.device) - offsets[:, None]
    exact = scorer.scores(key, value, weights)
    linear = exact if kv_dtype == "auto" else scorer.scores(*_rounded(kv_dtype, key, value), weights)
    sizes = [1] * tokens if segments is None else list(segments)
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    own = linear.clone()  # scores by which a key is ranked at the end of its segment
    for begin, end in pairwise(ends):
        part = slice(begin, end)
        pads = (offsets - begin).clamp(0, end - begin)
        given = scoring[:, :, part], key[:, :, part], exact[:, :, part]
        found = segment_scores(*given, pads, softmax, rotary)
        own[:, :, part] = linear[:, :, part] if found is None else found
    output, whole = torch.zeros_like(query), ends[1]
    for head, pattern in enumerate(patterns):
        rows, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
        extra = None if sink_logits is None else sink_logits[rows]
        keys, values = key[:, one].clone(), value[:, one].clone()
        for row, pad in enumerate(offsets.tolist()):
            evicts = pattern.top_k and frozen != 0 and pattern.size(whole - pad) < whole - pad
            if evicts and rotary is not None and whole - pad >= LEAST:
                real = slice(pad, whole)
                prompt = scoring[row, rows, real], key[row, head, real], value[row, head, real], own[row, head, real]
                refitted = reference_refit(*prompt, pattern, (scaling, softcap, extra), rotary)
                keys[row, 0, real], values[row, 0, real], own[row, head, real] = refitted
        mask = segment_mask(pattern, positions, linear[:, head], own[:, head], ends, frozen, decode_window)[:, None]
        keys, values = _rounded(kv_dtype, keys, values)
        output[:, rows] = masked_attention(query[:, rows], keys, values, mask, scaling, softcap, extra)
        for begin, end in pairwise(ends):
            part = slice(begin, end)
            if end - begin > 1:  # it sees its own keys before they are refitted and rounded
                pairs = (keys, key[:, one]), (values, value[:, one])
                now, own_values = (torch.cat([old[:, :, :begin], new[:, :, part]], 2) for old, new in pairs)
                seen, own_query = mask[:, :, part, :end], query[:, rows, part]
                output[:, rows, part] = masked_attention(own_query, now, own_values, seen, scaling, softcap, extra)
    return output


def _rounded(kv_dtype: KVDtype, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return decode(kv_dtype, *encode(kv_dtype, key, value), key.dtype)


def reference_refit(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, pattern: Pattern, softmax: Softmax, rotary: Rotary
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and scores of a prompt after refitting. Arguments as for `refitting.refit_keys`."""
    (scaling, softcap, _), columns = softmax, torch.arange(len(key), device=key.device)
    between = (columns >= pattern.sink) & (columns < len(key) - (pattern.window or 0))
    best = scores.masked_fill(~between, NONE).argsort(descending=True, stable=True)[: pattern.top_k]
    kept = ~between
    kept[best] = True
    stride = -(-len(query) * len(key) // ROWS)
    again = rotate(query[:, ::stride], len(key) + AHEAD, rotary)[None].to(key)
    one = torch.eye(len(key)).to(key)[None, None]

    def attention(keys: Tensor, seen: Tensor) -> Tensor:
        return masked_attention(again, keys[None, None], one, seen, *softmax)[0].flatten(0, 1)

    full, keys, values, scores = attention(key, torch.ones_like(kept)), key.clone(), value.clone(), scores.clone()
    if len(best) > 1:
        evicted = ~kept
        evicted[best[-1]] = True
        queries = again[0].flatten(0, 1) * scaling
        logits = queries @ key[evicted].T
        target = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).logsumexp(-1)
        given = queries, full[:, evicted], target, key[evicted], value[evicted]
        synthetic = reference_synthetic_key(*given, MASS_STRIDE)
        (keys[best[-1]], values[best[-1]]), scores[best[-1]] = synthetic, ALWAYS
    few = attention(keys, kept)
    weights, missed = few[:, best], full @ value - few @ values
    ridge = (RIDGE * weights.square().sum() / len(best)).sqrt() * torch.eye(len(best)).to(key)
    change = torch.linalg.lstsq(
        torch.cat([weights, ridge]), torch.cat([missed, missed.new_zeros(len(best), missed.shape[1])])
    )
    return keys, values.index_add(0, best, change.solution), scores


def reference_synthetic_key(
    queries: Tensor, lost: Tensor, target: Tensor, key: Tensor, value: Tensor, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the key and the value that stand for evicted ones, [keys, dim].

    queries: scaled, [queries, dim]. lost: attention to the evicted keys, [queries, keys]. target: log-sum-exp of their logits.
    stride: one in so many queries counts for the means.
    """
    some = lost[::stride]
    mean, mean_value = (some.sum(0) @ given / some.sum() for given in (key, value))
    weight, dim = (lost.sum(1) / lost.sum(1).mean()).sqrt()[:, None], key.shape[1]
    ridge = (KEY_RIDGE * (queries * weight).square().sum() / dim).sqrt() * torch.eye(dim).to(key)
    missing = weight * (target - queries @ mean)[:, None]
    rows = torch.cat([queries * weight, ridge]), torch.cat([missing, missing.new_zeros(dim, 1)])
    return mean + torch.linalg.lstsq(*rows).solution[:, 0], mean_value


def segment_mask(
    pattern: Pattern,
    positions: Tensor,
    scores: Tensor,
    own: Tensor,
    ends: Sequence[int],
    frozen: int | None = None,
    decode_window: int = 0,
) -> Tensor:
    """Return which keys each query sees: bool [batch, tokens, tokens].

    positions: int [batch, tokens], negative for padding. ends: columns where segments begin and end. scores, own: float [batch,
    tokens]; a key is ranked by `own` if it leaves the window at the end of its own segment, and the head then holds less than all
    columns; otherwise by `scores`. frozen, decode_window: as for `reference_attention`; a segment begins at `frozen`.
    """
    batch, tokens = positions.shape
    seen = torch.zeros(batch, tokens, tokens, dtype=torch.bool, device=positions.device)
    held = torch.zeros(batch, tokens, dtype=torch.bool, device=positions.device)
    ranks = scores.clone()
    for begin, end in pairwise(ends):
        held[:, begin:end] = positions[:, begin:end] >= 0
        evicts = pattern.window is not None and (frozen is None or begin < frozen)
        if end - begin > 1 or not evicts:
            causal = torch.arange(tokens, device=held.device) <= torch.arange(begin, end, device=held.device)[:, None]
            seen[:, begin:end] = held[:, None] & causal
        if evicts:
            own_pattern = pattern.widen(decode_window) if end - begin == 1 else pattern
            safe = (positions < pattern.sink) | (positions > positions[:, end - 1 : end] - (own_pattern.window or 0))
            if own_pattern.size(end) < end:
                ranks[:, begin:end] = torch.where(safe, scores, own)[:, begin:end]
            candidates = held & ~safe
            order = ranks.masked_fill(~candidates, NONE).argsort(dim=-1, descending=True, stable=True).argsort(-1)
            held &= safe | (order < pattern.top_k)
            if end - begin == 1:
                seen[:, begin] = held
    return seen


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return the attention of the queries of one KV head: [batch, query heads, queries, dim].

    query: [batch, query heads, queries, dim]; key, value: [batch, 1, keys, dim]; mask: bool [batch, 1, queries, keys]. softcap:
    logits become softcap x tanh(logits / softcap) (Gemma 2). sink_logits: float [query heads], logits in the softmax without a
    value (gpt-oss).
    """
    logits = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits[:, None, None].to(logits).expand(*logits.shape[:3], 1)], -1)
    shares = logits.softmax(-1).nan_to_num(0.0)  # zero if no key is visible
    return shares[..., : key.shape[2]] @ value
