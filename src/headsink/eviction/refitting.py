"""Value refitting: least-squares values for the keys that a head keeps (Attention Matching, arXiv 2602.16284).

After eviction, the output of a head lacks the values of the evicted keys. New values of the kept keys make up for some of it.
They are fitted for reference queries: those of the prompt, rotated on to where a repeat of the prompt would stand, as for prompt
scores (eviction/scorers/prompt.py). Refitting changes no shape and uses no extra memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headsink.eviction.pattern import Pattern
from headsink.eviction.scorers.prompt import AHEAD, Softmax
from headsink.models.rope import rotate

ROWS = 512  # reference queries of a KV head at most, evenly spaced
RIDGE = 10.0  # ridge penalty, as a multiple of the mean squared attention to a kept key, summed over the queries


def refit_values(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, pattern: Pattern, softmax: Softmax, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the top-k keys of a KV head, int64 [top_k], and new values for them, [top_k, dim].

    query: [group, tokens, dim]; key, value: [tokens, dim], of a prompt that is longer than what the pattern keeps; query and key
    are rotated. scores: importance scores, [tokens]. softmax, inverse: as for `prompt.segment_scores`, of this KV head.
    """
    kind, tokens, (scaling, softcap, sink_logits) = torch.promote_types(key.dtype, torch.float32), len(key), softmax
    end = tokens - (pattern.window or 0)
    best = scores[pattern.sink : end].topk(pattern.top_k).indices + pattern.sink
    columns = torch.arange(tokens, device=key.device)
    kept = torch.cat([best, columns[: pattern.sink], columns[end:]])
    some = query[:, :: -(-query.shape[0] * tokens // ROWS)]
    again = rotate(some, tokens + AHEAD, inverse) * scaling  # [group, queries, dim]
    key, value = key.to(kind), value.to(kind)

    def attention(keys: Tensor) -> Tensor:
        logits = again @ keys.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        if sink_logits is not None:
            logits = torch.cat([logits, sink_logits.to(kind)[:, None, None].expand(*logits.shape[:2], 1)], -1)
        return logits.softmax(-1)[..., : len(keys)].flatten(0, 1)

    weights = attention(key[kept])
    residual = attention(key) @ value - weights @ value[kept]
    return best, value[best] + ridge_regression(weights[:, : len(best)], residual, RIDGE)


def ridge_regression(weights: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """Return the change of values, [keys, dim], whose product with `weights` is closest to `residual`.

    weights: attention to each key, [queries, keys]; residual: [queries, dim]. ridge: as `RIDGE`. In the dual form: there are few
    queries.
    """
    products = weights @ weights.T
    penalty = (ridge / max(weights.shape[1], 1) * products.trace()).clamp(min=torch.finfo(products.dtype).tiny)
    products.diagonal().add_(penalty)
    factor = torch.linalg.cholesky_ex(products).L  # does not block the host
    return weights.T @ torch.cholesky_solve(residual, factor)
