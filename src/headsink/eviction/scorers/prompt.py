"""Prompt scores: the importance of the keys of a segment by the segment's own queries, without a second forward pass.

Context reconstruction (compression/reconstruction.py, KVzip, arXiv 2505.23416) lets the model repeat the prompt, and ranks a key
by the largest attention that it receives meanwhile. Rotary embeddings compose, so the query of a repeated token is about the
prompt's own query, rotated on to where the repeat would stand. The score of a key is the largest logit that such queries of
tokens near it give to the key, relative to the log-sum-exp of the prompt's own queries.

These scores and those of the plan's scorer are standardised and added. The sums are then mapped, rank by rank, to the scale of
the plan's scorer, so that they compare with the scores of later keys.
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
BLOCK = 128  # tokens of a segment at once
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
            found[row, :, own] = match_scale(_standard(shares) + _standard(scores[row, :, own]), scores[row, :, own])
    return found


def largest_shares(query: Tensor, key: Tensor, softmax: Softmax, rotary: Rotary, lse: Tensor | None = None) -> Tensor:
    """Return the log of the largest attention that each key gets from a repeat of the text: [KV heads, tokens].

    query: [query heads, tokens, dim], key: [KV heads, tokens, dim], both rotated. lse: [query heads, tokens], or None. Memory is
    linear in the tokens.
    """
    kind, (scaling, softcap, sink_logits) = torch.promote_types(key.dtype, torch.float32), softmax
    tokens, columns = key.shape[1], torch.arange(key.shape[1], device=key.device)
    keys = key.to(kind).transpose(-1, -2)
    own = query[:, ::STRIDE].unflatten(0, (len(key), -1)).to(kind) * scaling  # [KV heads, group, queries, dim]
    again = rotate(own, tokens + AHEAD, rotary)
    known = None if lse is None else lse[:, ::STRIDE].unflatten(0, (len(key), -1))
    extra = None if sink_logits is None else sink_logits.to(kind).view(len(key), -1, 1)

    def logits(queries: Tensor, part: slice) -> Tensor:
        found = (queries.flatten(1, 2) @ keys[..., part]).view(*queries.shape[:3], -1)
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    found = key.new_full((len(key), tokens), float("-inf"), dtype=kind)
    for begin in range(0, tokens, BLOCK):
        end = min(begin + BLOCK, tokens)
        at, part = columns[begin:end:STRIDE, None], slice(begin // STRIDE, -(-end // STRIDE))
        if known is None:
            causal = logits(own[:, :, part], slice(end)).masked_fill_(columns[:end] > at, float("-inf"))
            total = causal.logsumexp(-1)
            total = total if extra is None else torch.logaddexp(total, extra)
        else:
            total = known[:, :, part]
        near = slice(max(begin - AFTER, 0), min(end + BEFORE, tokens))
        distance = at - columns[near]
        far = (distance < -BEFORE) | (distance > AFTER)
        shares = (logits(again[:, :, part], near) - total[..., None]).amax(1).masked_fill_(far, float("-inf"))
        found[:, near] = found[:, near].maximum(shares.amax(1))
    return found


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
