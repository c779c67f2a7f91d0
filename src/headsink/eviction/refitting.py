"""Refitting of the keys that a head keeps of a prompt: least-squares values, and one synthetic key (Attention Matching, arXiv
2602.16284).

After eviction, the output of a head lacks the values of the evicted keys, and the attention to them goes to the kept keys. Two
things make up for some of it. The last of the top-k keys is replaced by a synthetic key, which takes part of the attention that
the evicted keys got. And the values of the top-k keys are refitted. Both are fitted for reference queries: those of the prompt,
rotated on to where a repeat of the prompt would stand, as for prompt scores (eviction/scorers/prompt.py). Neither changes a shape
or uses extra memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headsink.eviction.pattern import Pattern
from headsink.eviction.scorers.prompt import AHEAD, Softmax
from headsink.models.rope import Rotary, rotate
from headsink.utils import flash

ROWS = 512  # reference queries of a KV head at most, evenly spaced
# Ridge penalties: of values, as a multiple of the mean squared attention to a kept key, summed over the queries; of the synthetic
# key, as a multiple of the mean squared coordinate of a query, weighted, and summed likewise.
RIDGE, KEY_RIDGE = 10.0, 10.0
MASS_STRIDE = 8  # of the reference queries, one in so many says how much attention each evicted key gets


def stride(group: int, tokens: int) -> int:
    """Return the distance between the reference queries of a prompt, in tokens. group: query heads per KV head."""
    return -(-group * tokens // ROWS)


def reference_queries(query: Tensor) -> Tensor:
    """Return the reference queries of a prompt. query: of all its tokens, [..., group, tokens, dim]."""
    return query[..., :: stride(*query.shape[-3:-1]), :]


def refit_keys(
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    patterns: Sequence[Pattern],
    softmax: Softmax,
    rotary: Rotary,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return, for each KV head, its top-k keys, int64 [top_k], with new keys and new values for them, [top_k, dim].

    Only the last of the new keys differs: it is the synthetic key, if there are two top-k keys or more.

    queries: the reference queries, [heads, group, queries, dim]; key, value: [heads, tokens, dim], of a prompt that is longer
    than what any of the patterns keeps; queries and keys are rotated. scores: importance scores, [heads, tokens]. softmax,
    rotary: as for `prompt.segment_scores`, of these heads.
    """
    kind, tokens, (scaling, softcap, sink_logits) = torch.promote_types(key.dtype, torch.float32), key.shape[1], softmax
    # In the keys' dtype, so that all products are of the same numbers.
    again = rotate(queries, tokens + AHEAD, rotary).flatten(1, 2).to(key.dtype)  # [heads, queries, dim]
    extra = None
    if sink_logits is not None:
        extra = sink_logits.to(kind).view(len(key), -1).repeat_interleave(queries.shape[2], 1)[..., None]
    rows = again.to(kind) * scaling

    def logits_of(rows: Tensor, keys: Tensor) -> Tensor:
        found = rows @ keys.to(kind).mT
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    if softcap is None and extra is None and flash.has_kernel(again):  # does not store the attention to every key
        found, lse = flash.attend(again[None], key[None], value[None], scaling, is_causal=False)
        outputs, totals = found[0].to(kind), lse[0, ..., None]
    else:
        outputs, totals = torch.empty_like(rows), rows.new_empty(*rows.shape[:2], 1)
        for head in range(len(key)):  # one head's logits at a time
            logits = logits_of(rows[head], key[head])
            total = logits.logsumexp(-1, keepdim=True)
            totals[head] = total if extra is None else torch.logaddexp(total, extra[head])
            outputs[head] = (logits - totals[head]).exp() @ value[head].to(kind)
    columns, some = torch.arange(tokens, device=key.device), slice(None, None, MASS_STRIDE)
    kept, near, share = [], [], rows.new_empty(rows.shape[:2])  # attention to evicted keys
    mean, mean_value = rows.new_empty(len(key), key.shape[2]), rows.new_empty(len(key), value.shape[2])
    for head, pattern in enumerate(patterns):
        end, last = tokens - (pattern.window or 0), pattern.top_k - 1
        best = scores[head, pattern.sink : end].topk(pattern.top_k).indices + pattern.sink
        kept.append(torch.cat([best, columns[: pattern.sink], columns[end:]]))
        keys, total = key[head].to(kind), totals[head]
        near.append(logits_of(rows[head], keys[kept[head]]))
        weights = (near[head] - total).exp_()
        share[head] = 1 - (weights.sum(-1) - weights[:, last])  # the synthetic key replaces the last one
        evicted = torch.ones_like(keys[:, 0]).index_fill_(0, kept[head], 0).index_fill_(0, best[last:], 1)
        mass = (logits_of(rows[head, some], keys) - total[some]).exp_().sum(0) * evicted
        mean[head], mean_value[head] = mean_of(mass, evicted, keys), mean_of(mass, evicted, value[head])
    if extra is not None:
        share -= (extra - totals).exp_()[..., 0]
    share = share.where(share > 100 * torch.finfo(kind).eps, 0)  # less is rounding
    synthetic = synthetic_key(rows, share, totals[..., 0], mean)
    towards = logits_of(rows, synthetic[:, None])[..., 0]
    results = []
    for head, (own, logits, pattern) in enumerate(zip(kept, near, patterns, strict=True)):
        top, last = slice(0, pattern.top_k), pattern.top_k - 1
        keys, values = key[head, own[top]].to(kind), value[head, own].to(kind)
        if last > 0:
            keys[last], values[last], logits[:, last] = synthetic[head], mean_value[head], towards[head]
        weights = (logits if extra is None else torch.cat([logits, extra[head]], -1)).softmax(-1)[:, : len(own)]
        residual = outputs[head] - weights @ values
        results.append((own[top], keys, values[top] + ridge_regression(weights[:, top], residual, RIDGE)))
    return results


def mean_of(mass: Tensor, evicted: Tensor, given: Tensor) -> Tensor:
    """Return the mean of the evicted keys or values, `given` [..., tokens, dim], weighted by the attention to them: [..., dim].

    mass: attention to each evicted key, 0 for the others, [..., tokens]. evicted: 1 for evicted keys, 0 for the others,
    [..., tokens]; all count the same if no query attends to any of them.
    """
    mass = mass + torch.finfo(mass.dtype).tiny * evicted
    return ((mass / mass.sum(-1, keepdim=True))[..., None, :] @ given.to(mass.dtype))[..., 0, :]


def synthetic_key(queries: Tensor, share: Tensor, total: Tensor, mean: Tensor) -> Tensor:
    """Return a key that stands for the evicted keys, [..., dim].

    Ridge regression moves their mean, so that its logits come closer to the log-sum-exp of those of the evicted keys. A query
    counts by its attention to them.

    queries: scaled, [..., queries, dim]; share: attention to the evicted keys, [..., queries]; total: log-sum-exp of all logits,
    [..., queries]; mean: of the evicted keys, weighted by attention, [..., dim].
    """
    tiny = torch.finfo(share.dtype).tiny
    weight = share / share.mean(-1, keepdim=True).clamp(min=tiny)
    rows = (queries * weight[..., None]).mT
    products = rows @ queries
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    penalty = KEY_RIDGE / mean.shape[-1] * diagonal.sum(-1, keepdim=True)
    diagonal.add_(penalty.clamp(min=tiny))
    missing = share.clamp(min=tiny).log() + total - (queries @ mean[..., None])[..., 0]
    factor = torch.linalg.cholesky_ex(products).L  # does not block the host
    return mean + torch.cholesky_solve(rows @ missing[..., None], factor)[..., 0]


def ridge_regression(weights: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """Return the change of values, [keys, dim], whose product with `weights` is closest to `residual`.

    weights: attention to each key, [queries, keys]; residual: [queries, dim]. ridge: as `RIDGE`.
    """
    dual = len(weights) < weights.shape[1]  # the smaller of the two systems of equations
    products = weights @ weights.T if dual else weights.T @ weights
    penalty = (ridge / max(weights.shape[1], 1) * products.trace()).clamp(min=torch.finfo(products.dtype).tiny)
    products.diagonal().add_(penalty)
    factor = torch.linalg.cholesky_ex(products).L  # does not block the host
    if dual:
        return weights.T @ torch.cholesky_solve(residual, factor)
    return torch.cholesky_solve(weights.T @ residual, factor)
