"""Refitting of the keys that a head keeps of a prompt: least-squares values, and one synthetic key (Attention Matching, arXiv
2602.16284).

After eviction, the output of a head lacks the values of the evicted keys, and the attention to them goes to the kept keys. Two
things make up for some of it. The last of the top-k keys is replaced by a synthetic key, which takes part of the attention that
the evicted keys got. And the values of the top-k keys are refitted. Both are fitted for reference queries: those of the prompt,
rotated on to where a repeat of the prompt would stand, as for prompt scores (eviction/scorers/prompt.py). Neither changes a shape
or uses extra memory.
"""

from __future__ import annotations

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
    """Return the reference queries of a prompt. query: of all its tokens, [group, tokens, dim]."""
    return query[:, :: stride(*query.shape[:2])]


def refit_keys(
    queries: Tensor, key: Tensor, value: Tensor, scores: Tensor, pattern: Pattern, softmax: Softmax, rotary: Rotary
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top-k keys of a KV head, int64 [top_k], with new keys and new values for them, [top_k, dim].

    Only the last of the new keys differs: it is the synthetic key, if there are two top-k keys or more.

    queries: the reference queries, [group, queries, dim]; key, value: [tokens, dim], of a prompt that is longer than what the
    pattern keeps; queries and keys are rotated. scores: importance scores, [tokens]. softmax, rotary: as for
    `prompt.segment_scores`, of this KV head.
    """
    kind, tokens, (scaling, softcap, sink_logits) = torch.promote_types(key.dtype, torch.float32), len(key), softmax
    end = tokens - (pattern.window or 0)
    best = scores[pattern.sink : end].topk(pattern.top_k).indices + pattern.sink
    columns = torch.arange(tokens, device=key.device)
    kept = torch.cat([best, columns[: pattern.sink], columns[end:]])
    # In the keys' dtype, so that all products are of the same numbers.
    again = rotate(queries, tokens + AHEAD, rotary).flatten(0, 1).to(key.dtype)  # [queries, dim]
    rows = again.to(kind)
    extra = None if sink_logits is None else sink_logits.to(kind).repeat_interleave(queries.shape[1])[:, None]

    def logits_of(rows: Tensor, keys: Tensor) -> Tensor:
        found = scaling * (rows @ keys.T.to(kind))
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    if softcap is None and extra is None and flash.has_kernel(again):  # does not store the attention to every key
        found, lse = flash.attend(again[None, None], key[None, None], value[None, None], scaling, is_causal=False)
        output, total = found[0, 0].to(kind), lse[0, 0, :, None]
    else:
        logits = logits_of(rows, key)
        total = logits.logsumexp(-1, keepdim=True)
        total = total if extra is None else torch.logaddexp(total, extra)
        output = (logits - total).exp() @ value.to(kind)
    keys, values, last = key[kept].to(kind), value[kept].to(kind), len(best) - 1
    logits = logits_of(rows, keys)
    if last > 0:
        share = (logits - total).exp_()
        share[:, last] = 0  # the synthetic key replaces this one
        share = 1 - share.sum(-1, keepdim=True)  # attention to evicted keys
        if extra is not None:
            share = share - (extra - total).exp()
        some = slice(None, None, MASS_STRIDE)
        evicted = torch.ones_like(scores, dtype=kind).index_fill_(0, kept, 0)
        evicted[best[-1]] = 1
        mass = (logits_of(rows[some], key) - total[some]).exp_().sum(0) * evicted
        mean, values[last] = (mean_of(mass, evicted, given) for given in (key, value))
        share = share.where(share > 100 * torch.finfo(kind).eps, 0)[:, 0]  # less is rounding
        keys[last] = synthetic_key(scaling * rows, share, total[:, 0], mean)
        logits[:, last] = logits_of(rows, keys[last:][:1])[:, 0]
    weights = (logits if extra is None else torch.cat([logits, extra], -1)).softmax(-1)[:, : len(kept)]
    residual = output - weights @ values
    return best, keys[: len(best)], values[: len(best)] + ridge_regression(weights[:, : len(best)], residual, RIDGE)


def mean_of(mass: Tensor, evicted: Tensor, given: Tensor) -> Tensor:
    """Return the mean of the evicted keys or values, `given` [tokens, dim], weighted by the attention to them.

    mass: attention to each evicted key, 0 for the others, [tokens]. evicted: 1 for evicted keys, 0 for the others, [tokens]; all
    count the same if no query attends to any of them.
    """
    mass = mass + torch.finfo(mass.dtype).tiny * evicted
    return (mass / mass.sum()) @ given.to(mass.dtype)


def synthetic_key(queries: Tensor, share: Tensor, total: Tensor, mean: Tensor) -> Tensor:
    """Return a key that stands for the evicted keys, [dim].

    Ridge regression moves their mean, so that its logits come closer to the log-sum-exp of those of the evicted keys. A query
    counts by its attention to them.

    queries: scaled, [queries, dim]; share: attention to the evicted keys, [queries]; total: log-sum-exp of all logits, [queries];
    mean: of the evicted keys, weighted by attention, [dim].
    """
    tiny = torch.finfo(share.dtype).tiny
    weight = share / share.mean().clamp(min=tiny)
    rows = queries * weight[:, None]
    products = rows.T @ queries
    penalty = KEY_RIDGE / len(mean) * products.trace()
    products.diagonal().add_(penalty.clamp(min=tiny))
    missing = share.clamp(min=tiny).log() + total - queries @ mean
    factor = torch.linalg.cholesky_ex(products).L  # does not block the host
    return mean + torch.cholesky_solve((rows.T @ missing)[:, None], factor)[:, 0]


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
