"""Dense prefill: a call of several tokens is read in segments, after each of which the heads of a layer evict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headsink.attention import causal
from headsink.attention.params import AttentionParams
from headsink.cache.head_group import HeadGroup
from headsink.eviction.scorers.prompt import segment_scores


@dataclass(frozen=True)
class PrefillOptions:
    """How calls of several tokens are read.

    dense: in full attention to all cached keys and to the call, after which each head evicts; otherwise keys are evicted while
    they are read, token by token. chunk_size: a dense segment ends at columns that are multiples of it; None: at the end of the
    call. rotary: inverse rotary frequencies for prompt scores (eviction/scorers/prompt.py), None for a model without known ones.
    """

    dense: bool = True
    chunk_size: int | None = None
    rotary: Tensor | None = None


DENSE = PrefillOptions()


def attend_segments(
    groups: Sequence[HeadGroup],
    weights: Tensor,
    options: PrefillOptions,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: AttentionParams,
) -> Tensor:
    """Attend from each segment of a call to all cached keys and to the segment, then evict: [batch, query heads, tokens, dim].

    groups: all head groups of the layer. weights: scorer weights, [KV heads, features]. query: [batch, query heads, tokens, dim];
    key, value: [batch, KV heads, tokens, dim].
    """
    tokens, chunk = key.shape[2], options.chunk_size
    if chunk is None or groups[0].recording:  # a recorded segment is evicted by `crop`
        return _attend_segment(groups, weights, options, module, query, key, value, softmax)
    output, begin = torch.empty_like(query), 0
    while begin < tokens:
        end = min(begin + chunk - groups[0].columns % chunk, tokens)
        own_query, own_key, own_value = (t[:, :, begin:end] for t in (query, key, value))
        output[:, :, begin:end] = _attend_segment(
            groups, weights, options, module, own_query, own_key, own_value, softmax
        )
        begin = end
    return output


def _attend_segment(
    groups: Sequence[HeadGroup],
    weights: Tensor,
    options: PrefillOptions,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: AttentionParams,
) -> Tensor:
    """Attend from one segment. A segment of one token, at the end of a chunk, evicts first, as in decoding."""
    batch, kv_heads, tokens, _ = key.shape
    before = groups[0].columns
    evicting = [group for group in groups if tokens > 1 and group.must_evict(tokens)]
    apart, padding, lse = before > 0 or tokens == 1, groups[0].padding, None
    if apart:
        grouped = query.view(batch, kv_heads, -1, tokens, query.shape[3])
        output = torch.empty_like(grouped)
    elif softmax.plain and evicting and causal.has_kernel(query):
        pads = None if padding is None else padding.tokens
        whole, lse = causal.causal_attention(query, key, value, pads, softmax.scaling)
    else:
        whole = HeadGroup.over(key, value, padding, exact=not evicting).attend_held(module, query, softmax)
    # Below capacity the plan's scorer ranks the keys later, also where a crop has taken tokens back.
    scored, scores = [g for g in evicting if g.pattern.top_k and g.exceeds_capacity(tokens)], None
    if scored:
        scores = _segment_scores(groups[0], weights, options, query, key, value, softmax, lse)
    for group in groups:
        own_key, own_value = key[:, group.index], value[:, group.index]
        if apart:
            part = grouped[:, group.index].flatten(1, 2)
            attend = group.attend_all if group in evicting else group.attend
            found = attend(module, part, own_key, own_value, softmax.of(group.heads, kv_heads))
            output[:, group.index] = found.view(batch, len(group.heads), -1, tokens, query.shape[3])
        if group in evicting:
            own = scores[:, group.index] if scores is not None and group in scored else None
            group.append_segment(own_key, own_value, own)
        elif not apart:
            group.append_keys(own_key, own_value)
    return output.flatten(1, 2) if apart else whole


def _segment_scores(
    first: HeadGroup,
    weights: Tensor,
    options: PrefillOptions,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: AttentionParams,
    lse: Tensor | None,
) -> Tensor | None:
    """Return the prompt scores of the keys of a segment, [batch, KV heads, tokens], or None (eviction/scorers/prompt.py).

    lse: log-sum-exp of the causal attention, [batch, query heads, tokens], if it is known.
    """
    padding = first.padding
    pads = None if padding is None else (padding.tokens - first.columns).clamp(0, key.shape[2])
    with torch.no_grad():
        scores = first.scorer.scores(key, value, weights)
        return segment_scores(query, key, scores, pads, *softmax, options.rotary, lse)
