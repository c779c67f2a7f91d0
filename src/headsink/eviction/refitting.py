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

ROWS = 512  # reference queries of a KV head at most, evenly spaced
# Ridge penalties: of values, as a multiple of the mean squared attention to a kept key, summed over the queries; of the synthetic
# key, as a multiple of the mean squared coordinate of a query, weighted, and summed likewise.
RIDGE, KEY_RIDGE = 10.0, 10.0


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
    again = (rotate(queries, tokens + AHEAD, rotary) * scaling).flatten(0, 1)  # [queries, dim]
    key, value = key.to(kind), value.to(kind)
    extra = None
    if sink_logits is not None:
        extra = sink_logits.to(kind).repeat_interleave(queries.shape[1])[:, None]

    def attention(keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention to each key, [queries, keys], and the logits."""
        logits = again @ keys.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        if extra is not None:
            logits = torch.cat([logits, extra], -1)
        return logits.softmax(-1)[:, : len(keys)], logits[:, : len(keys)]

    full, logits = attention(key)
    keys, values = key[kept], value[kept]
    if pattern.top_k > 1:
        evicted = torch.ones(tokens, dtype=kind, device=key.device).index_fill_(0, kept, 0)
        evicted[best[-1]] = 1
        mine = slice(len(best) - 1, len(best))
        total = logits.amax(-1) - full.amax(-1).log()  # log-sum-exp, without another pass over all exponentials
        keys[mine], values[mine] = synthetic_key(again, full, total, key, value, evicted)
    weights, _ = attention(keys)
    residual = full @ value - weights @ values
    return best, keys[: len(best)], values[: len(best)] + ridge_regression(weights[:, : len(best)], residual, RIDGE)


def synthetic_key(
    queries: Tensor, full: Tensor, total: Tensor, key: Tensor, value: Tensor, evicted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a key and a value that stand for the evicted keys, [dim] each.

    They are the means of the evicted keys and values, weighted by attention. Then ridge regression moves the key, so that its
    logits come closer to the log-sum-exp of those of the evicted keys; a query counts by its attention to them.

    queries: scaled, [queries, dim]; full, total: attention to all keys and its log-sum-exp, [queries, tokens] and [queries]; key,
    value: [tokens, dim]. evicted: 1 for evicted keys, 0 for the others, [tokens].
    """
    tiny = torch.finfo(full.dtype).tiny
    share = full @ evicted  # [queries]
    mass = (full.sum(0) + tiny) * evicted  # equal, if no query attends to any of them
    mass = mass / mass.sum()
    mean = mass @ key
    weight = share / share.mean().clamp(min=tiny)
    rows = queries * weight[:, None]
    products = rows.T @ queries
    penalty = KEY_RIDGE / len(mean) * products.trace()
    products.diagonal().add_(penalty.clamp(min=tiny))
    missing = share.clamp(min=tiny).log() + total - queries @ mean
    factor = torch.linalg.cholesky_ex(products).L  # does not block the host
    return mean + torch.cholesky_solve((rows.T @ missing)[:, None], factor)[:, 0], mass @ value


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
