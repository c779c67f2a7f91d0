"""Prompt scores: the importance of the keys of a segment by the segment's own queries, without a second forward pass.

Context reconstruction (compression/reconstruction.py, KVzip, arXiv 2505.23416) lets the model repeat the prompt, and ranks a key
by the largest attention that it receives meanwhile. Rotary embeddings compose, so the query of a repeated token is about the
prompt's own query, rotated on to where the repeat would stand. The score of a key is the largest logit that such queries of
tokens near it give to the key, relative to the log-sum-exp of the prompt's own queries.

These scores and those of the plan's scorer are standardised and joined by logaddexp, a smooth maximum: a key counts if either of
them is high. The result is then mapped, rank by rank, to the scale of the plan's scorer, so that it compares with the scores of
later keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headsink.eviction.scorers.scorer import ALWAYS
from headsink.models.rope import Rotary, rotate

LEAST = 32  # tokens of a segment; the queries of a shorter one say too little
AHEAD = 8  # tokens of a request to repeat, which would stand between the segment and the repeat
BEFORE, AFTER = 8, 128  # queries around a key that score it: from the 8th before it to the 128th after it
STRIDE = 2  # of the queries, one in so many is used
BLOCK, NEAR_BLOCK = (
    128,
    64,
)  # tokens whose queries are multiplied at once with all keys before them, and with keys near them
# scaling, softcap, sink_logits: `AttentionParams` (attention/params.py)
Softmax = tuple[float, float | None, Tensor | None]


def segment_scores(
    query: Tensor,
    key: Tensor,
    scores: Tensor,
    pads: Tensor | None,
    softmax: Softmax,
    rotary: Rotary | None,
    lse: Tensor | None = None,
) -> Tensor | None:
    """Return the importance scores of the keys of a segment: [batch, KV heads, tokens], on the scale of `scores`.

    query: [batch, query heads, tokens, dim]; key: [batch, KV heads, tokens, dim], both rotated. scores: of the plan's
    scorer, float [batch, KV heads, tokens]. pads: tokens of left padding in the segment, int [batch], None if there is none.
    rotary: how the layer rotates queries, None if that is not known. lse: log-sum-exp of the
    segment's causal logits, [batch, query heads, tokens], if it is known.
    Returns None where the plan's scorer decides alone. Scores of padding are undefined.
    """
    tokens = key.shape[2]
    if rotary is None or tokens < LEAST:
        return None
    found = scores.clone()
    for row, first in enumerate([0] * len(key) if pads is None else pads.tolist()):
        if tokens - first >= LEAST:
            own = slice(first, tokens)
            total = None if lse is None else lse[row, :, own]
            shares = largest_shares(query[row, :, own], key[row, :, own], softmax, rotary, total)
            found[row, :, own] = join_scores(shares, scores[row, :, own])
    return found


def largest_shares(query: Tensor, key: Tensor, softmax: Softmax, rotary: Rotary, lse: Tensor | None = None) -> Tensor:
    """Return the log of the largest attention that each key gets from a repeat of the text: [KV heads, tokens].

    query: [query heads, tokens, dim], key: [KV heads, tokens, dim], both rotated. lse: [query heads, tokens], or None. Memory is
    linear in the tokens.
    """
    tokens, some = key.shape[1], query[:, ::STRIDE]
    totals = causal_lse(some, key, softmax) if lse is None else lse[:, ::STRIDE]
    return nearby_shares(some, totals, 0, key, 0, tokens, softmax, rotary)


def nearby_shares(
    query: Tensor,
    lse: Tensor,
    begin: int,
    key: Tensor,
    first: int,
    tokens: int,
    softmax: Softmax,
    rotary: Rotary,
) -> Tensor:
    """Return the log of the largest attention that keys get from some queries of a text, repeated after it: [KV heads, keys].

    query: [query heads, queries, dim], of every `STRIDE`-th token from `begin` on, of a text of `tokens` tokens. lse: of their
    causal logits, [query heads, queries]. key: [KV heads, keys, dim], of the tokens from `first` on. Minus infinity for keys that
    are near no query.
    """
    kind, (scaling, softcap, _) = torch.promote_types(key.dtype, torch.float32), softmax
    # Of query and key, the distance between them counts. There are fewer keys to rotate.
    keys = (rotate(key, -(tokens + AHEAD), rotary) * scaling).transpose(1, 2)
    own, totals = (
        given.to(kind).unflatten(0, (len(key), -1)) for given in (query, lse)
    )  # [KV heads, group, queries, ...]
    found, per_block = key.new_full(key.shape[:2], float("-inf"), dtype=kind), NEAR_BLOCK // STRIDE
    # From the first key near the first query of a block: [queries, keys].
    places = torch.arange(AFTER + NEAR_BLOCK - STRIDE + BEFORE + 1, device=key.device)
    distance = AFTER + STRIDE * places[:per_block, None] - places
    far = torch.zeros_like(distance, dtype=kind)
    far.masked_fill_((distance < -BEFORE) | (distance > AFTER), float("-inf"))
    for start in range(0, query.shape[1], per_block):
        part = slice(start, start + per_block)
        count = own[:, :, part].shape[2]
        lowest = begin + start * STRIDE - AFTER - first
        near = slice(max(lowest, 0), max(lowest + AFTER + (count - 1) * STRIDE + BEFORE + 1, 0))
        some, rows = keys[..., near], own[:, :, part].flatten(1, 2)
        offsets = (far[:count, near.start - lowest :][:, : some.shape[2]] - totals[:, :, part, None]).flatten(1, 2)
        shares = torch.baddbmm(offsets, rows, some) if softcap is None else offsets + _logits(rows, some, softcap)
        found[:, near] = found[:, near].maximum(shares.amax(1))
    return found


def causal_lse(query: Tensor, key: Tensor, softmax: Softmax) -> Tensor:
    """Return the log-sum-exp of the causal logits of every `STRIDE`-th query: [query heads, queries].

    query: [query heads, queries, dim], of the tokens 0, `STRIDE`, ...; key: [KV heads, tokens, dim].
    """
    kind, (scaling, softcap, sink_logits) = torch.promote_types(key.dtype, torch.float32), softmax
    keys, columns = key.to(kind).transpose(-1, -2), torch.arange(key.shape[1], device=key.device)
    own = query.unflatten(0, (len(key), -1)).to(kind) * scaling  # [KV heads, group, queries, dim]
    extra = None if sink_logits is None else sink_logits.to(kind).view(len(key), -1, 1)
    found = own.new_empty(own.shape[:-1])
    for begin in range(0, key.shape[1], BLOCK):
        end = min(begin + BLOCK, key.shape[1])
        part = slice(begin // STRIDE, -(-end // STRIDE))
        logits = _logits(own[:, :, part].flatten(1, 2), keys[..., :end], softcap).unflatten(1, (own.shape[1], -1))
        total = logits.masked_fill_(columns[:end] > columns[begin:end:STRIDE, None], float("-inf")).logsumexp(-1)
        found[:, :, part] = total if extra is None else torch.logaddexp(total, extra)
    return found.flatten(0, 1)


def _logits(queries: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    """queries: [KV heads, queries, dim]; keys: [KV heads, dim, keys]; one is scaled. Returns [KV heads, queries, keys]."""
    found = queries @ keys
    return found if softcap is None else softcap * torch.tanh(found / softcap)


def join_scores(shares: Tensor, scores: Tensor) -> Tensor:
    """Return the importance scores of a prompt's keys, on the scale of `scores`: [heads, keys].

    shares: the log of the largest attention to each key; scores: of the plan's scorer; both [heads, keys].
    """
    return match_scale(torch.logaddexp(_standard(shares), _standard(scores)), scores)


def match_scale(scores: Tensor, scale: Tensor) -> Tensor:
    """Return values on the scale of `scale` in the order of `scores`, both [heads, keys].

    The key with the n-th highest score gets a value between the n-th highest of `scale` and the next higher one, so that it is
    not the score of another key. `ALWAYS` stays.
    """
    values = scale.sort(-1).values
    steps = values.diff(dim=-1)
    values = values + torch.cat([steps, steps[..., -1:]], -1) / 2
    found = torch.empty_like(scale).scatter_(-1, scores.argsort(-1), values)
    return found.where(scores != ALWAYS, ALWAYS)


def _standard(scores: Tensor) -> Tensor:
    """Return the scores of each head with mean 0 and standard deviation 1."""
    return (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True).clamp(min=1e-12)
