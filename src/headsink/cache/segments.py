"""Dense prefill: a call of several tokens is read in segments, after each of which the heads of a layer evict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headsink.attention.params import AttentionParams
from headsink.cache.head_group import HeadGroup, View
from headsink.eviction.refitting import reference_queries, refit_keys
from headsink.eviction.scorers import ALWAYS
from headsink.eviction.scorers.prompt import LEAST, segment_scores
from headsink.models.rope import Rotary
from headsink.utils import flash


@dataclass(frozen=True)
class PrefillOptions:
    """How calls of several tokens are read.

    dense: in full attention to all cached keys and to the call, after which each head evicts; otherwise keys are evicted while
    they are read, token by token. chunk_size: a dense segment ends at columns that are multiples of it; None: at the end of the
    call. rotary: how the layer rotates queries, for prompt scores (eviction/scorers/prompt.py), None if that is not known.
    """

    dense: bool = True
    chunk_size: int | None = None
    rotary: Rotary | None = None


DENSE = PrefillOptions()


@dataclass(frozen=True)
class DensePrefill:
    """Dense prefill of one layer.

    groups: all head groups of the layer. weights: scorer weights, [KV heads, features]. Queries are [batch, query heads, tokens,
    dim]; keys and values [batch, KV heads, tokens, dim]. views: filled for other layers that attend to the same keys, else None.
    """

    groups: Sequence[HeadGroup]
    weights: Tensor
    options: PrefillOptions
    module: nn.Module
    softmax: AttentionParams
    views: list[View] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from each segment of a call to all cached keys and to the segment, then evict. Returns the query's shape."""
        tokens, chunk, first = key.shape[2], self.options.chunk_size, self.groups[0]
        if chunk is None or first.recording:  # a recorded segment is evicted by `crop`
            return self._attend_segment(slice(0, tokens), query, key, value)
        output, begin = torch.empty_like(query), 0
        while begin < tokens:
            end = min(begin + chunk - first.columns % chunk, tokens)
            part = slice(begin, end)
            output[:, :, part] = self._attend_segment(part, *(t[:, :, part] for t in (query, key, value)))
            begin = end
        return output

    def _attend_segment(self, part: slice, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from one segment, the tokens `part` of the call.

        A segment of one token, at the end of a chunk, evicts first, as in decoding.
        """
        batch, kv_heads, tokens, _ = key.shape
        groups, softmax, padding, lse = self.groups, self.softmax, self.groups[0].padding, None
        evicting = [group for group in groups if tokens > 1 and group.must_evict(tokens)]
        apart = groups[0].columns > 0 or tokens == 1
        grouped = query.unflatten(1, (kv_heads, -1))
        if not apart and self.views is not None:
            everything = HeadGroup.over(key, value, padding, exact=not evicting)
            self.views.append(View(part, everything, everything.attend_held))
        if apart:
            output = torch.empty_like(grouped)
        elif softmax.plain and evicting and flash.has_kernel(query):
            pads = None if padding is None else padding.tokens
            whole, lse = flash.causal_attention(query, key, value, pads, softmax.scaling)
        else:
            whole = HeadGroup.over(key, value, padding, exact=not evicting).attend_held(self.module, query, softmax)
        scored = [group for group in evicting if group.pattern.top_k]
        scores = self._scores(query, key, value, lse) if scored else None
        if scores is not None and not apart:
            key, value, scores = self._refit(scored, grouped, key, value, scores)
        for group in groups:
            own_key, own_value = key[:, group.index], value[:, group.index]
            # Keys are rounded after their own segment.
            first = group in evicting or (group.quantized and tokens > 1)
            if apart:
                own_query = grouped[:, group.index].flatten(1, 2)
                attend = (group.over_all if first else group.append)(own_key, own_value)
                found = attend(self.module, own_query, softmax.of(group.heads, kv_heads))
                if self.views is not None:
                    self.views.append(View(part, group, attend if first else group.held().attend_held))
                output[:, group.index] = found.view(batch, len(group.heads), -1, tokens, query.shape[3])
            if group in evicting:
                own = scores[:, group.index] if scores is not None and group in scored else None
                group.append_segment(own_key, own_value, own)
            elif first or not apart:
                group.append_keys(own_key, own_value)
        return output.flatten(1, 2) if apart else whole

    @torch.no_grad()
    def _scores(self, query: Tensor, key: Tensor, value: Tensor, lse: Tensor | None) -> Tensor | None:
        """Return the prompt scores of the keys of a segment, [batch, KV heads, tokens], or None (eviction/scorers/prompt.py).

        lse: log-sum-exp of the causal attention, [batch, query heads, tokens], if it is known.
        """
        first, padding = self.groups[0], self.groups[0].padding
        pads = None if padding is None else (padding.tokens - first.columns).clamp(0, key.shape[2])
        scores = first.scorer.scores(key, value, self.weights)
        return segment_scores(query, key, scores, pads, self.softmax, self.options.rotary, lse)

    @torch.no_grad()
    def _refit(
        self, groups: Sequence[HeadGroup], query: Tensor, key: Tensor, value: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and scores of a first segment with the top-k keys of groups refitted (eviction/refitting.py).

        A synthetic key is never evicted. Rows without prompt scores, and heads that evict nothing, stay as they are.
        query: [batch, KV heads, group, tokens, dim]; key, value: [batch, KV heads, tokens, dim]; scores: [batch, KV heads,
        tokens].
        """
        tokens, padding, rotary = key.shape[2], self.groups[0].padding, self.options.rotary
        key, value, scores = key.clone(), value.clone(), scores.clone()
        for row, first in enumerate([0] * len(key) if padding is None else padding.tokens.tolist()):
            length, part = tokens - first, slice(first, None)
            evicting = [group for group in groups if group.segment_pattern.size(length) < length]
            if rotary is None or length < LEAST or not evicting:
                continue
            heads = [head for group in evicting for head in group.heads]
            patterns = [group.segment_pattern for group in evicting for _ in group.heads]
            queries, softmax = reference_queries(query[row, :, :, part])[heads], self.softmax.of(heads, key.shape[1])
            own_key, own_value, own_scores = (given[row, heads, part] for given in (key, value, scores))
            found = refit_keys(queries, own_key, own_value, own_scores, patterns, softmax, rotary)
            for head, (best, keys, values) in zip(heads, found, strict=True):
                key[row, head, first + best], value[row, head, first + best] = keys.to(key), values.to(value)
                if len(best) > 1:
                    scores[row, head, first + best[-1:]] = ALWAYS
        return key, value, scores
