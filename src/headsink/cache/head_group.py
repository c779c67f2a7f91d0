"""HeadGroup: the KV heads of a layer with the same pattern, their cached keys (cache/slots.py), and attention over them.

A single token attends to the buffer in place, without a copy. For several tokens (prefill, verification), the group first
computes the query from which on each key is invisible. Then it attends in blocks of queries, each over the keys that its queries
see, so the cost of a window is linear in the length of the text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headsink.attention import backends
from headsink.attention.eager import attend_rows
from headsink.attention.params import QUERY_BLOCK, AttentionParams, Padding
from headsink.attention.visibility import KeyVisibility
from headsink.cache.options import LayerOptions
from headsink.cache.slots import Slots
from headsink.eviction.lifetimes import lifetimes
from headsink.eviction.pattern import FOREVER, FULL
from headsink.eviction.scorers import NONE
from headsink.models.rope import rotate_back

# Attention of queries, [batch, heads x group, tokens, dim], over keys that are known: (module, query, softmax) -> output.
Attend = Callable[[nn.Module, Tensor, AttentionParams], Tensor]


class View(NamedTuple):
    """How the queries of some tokens of a call attend to the keys of a group's heads."""

    tokens: slice
    group: HeadGroup
    attend: Attend


class _Keys(NamedTuple):
    """Keys and values, [batch, heads, keys, dim]: of the prefix slots, then of the columns from `first` to `end`.

    until: the column from which on each key is invisible, int64 [batch, heads, keys].
    """

    keys: Tensor
    values: Tensor
    until: Tensor
    first: int
    end: int
    prefix_slots: int


class HeadGroup(Slots):
    """The KV heads of one layer with the same pattern."""

    @classmethod
    def over(cls, key: Tensor, value: Tensor, padding: Padding | None, exact: bool) -> HeadGroup:
        """All heads with full attention over given keys and values, [batch, heads, tokens, dim], which are not copied."""
        options = LayerOptions(key.new_zeros(key.shape[1], 0), exact=exact)
        group = cls(FULL, list(range(key.shape[1])), options, key[:, :, :0], padding)
        group.keys, group.values, group.length = key, value, key.shape[2]
        real = group._positions(torch.arange(key.shape[2], device=key.device)) >= 0
        group.visible = real.expand(*key.shape[:2], -1).contiguous()
        return group

    def attend_held(self, module: nn.Module, query: Tensor, softmax: AttentionParams) -> Tensor:
        """Attention of the last token, or of the last tokens of a group that does not evict, as `Attend`."""
        backend, length = self._backend(query, softmax), self.length
        whole = softmax.plain and (self.pattern.full or self.below_capacity) and not self.holes and not self.quantized
        inexact = backend and (self.below_capacity or not self.exact) and self._beats_sdpa(backend, query)
        if whole and not inexact:
            return self._attend_full(module, query, softmax)
        if backend or query.shape[2] == 1:
            return self._attend_buffer(query, softmax)
        output = torch.empty_like(query)
        for start in range(0, query.shape[2], QUERY_BLOCK):
            block = query[:, :, start : start + QUERY_BLOCK]
            self.length = length - query.shape[2] + start + block.shape[2]
            output[:, :, start : start + QUERY_BLOCK] = self._attend_buffer(block, softmax)
        return output

    def over_all(self, key: Tensor, value: Tensor) -> Attend:
        """Return the attention of new tokens over all cached keys and their own, which are not appended."""
        ring = self._slots(torch.arange(self.length - self._held(), self.length, device=key.device))
        slots = torch.cat([torch.arange(self.prefix_slots, device=key.device), ring])
        held = self._decode(self.keys[:, :, slots], self.values[:, :, slots])
        keys, values = (torch.cat(parts, 2) for parts in zip(held, (key, value), strict=True))
        everything = HeadGroup.over(keys, values, self.padding, exact=False)
        columns = torch.arange(self.length, self.length + key.shape[2], device=key.device)
        new = (self._positions(columns) >= 0).expand(*key.shape[:2], -1)
        everything.visible, everything.holes = torch.cat([self.visible[:, :, slots], new], 2), True
        everything.prefix_slots, everything.start = self.prefix_slots, self.length - len(ring)
        everything.length = self.length + key.shape[2]
        return everything.attend_held

    def append_segment(self, key: Tensor, value: Tensor, scores: Tensor | None) -> None:
        """Append a segment and evict. scores: prompt scores of its keys, [batch, heads, tokens]; None: those of the scorer."""
        if self.recording:  # `crop` decides which tokens are appended
            self.recent, self.recent_scores, self.recent_segment = (key, value), scores, True
        else:
            self.end_segment(key, value, scores)

    def held(self) -> HeadGroup:
        """Return this group as it is now, which later tokens do not change."""
        now = copy.copy(self)
        if self.window is not None:  # otherwise nothing is overwritten
            now.keys, now.values, now.visible = self.keys.clone(), self.values.clone(), self.visible.clone()
        return now

    def append(self, key: Tensor, value: Tensor) -> Attend:
        """Append new tokens, [batch, heads, tokens, dim], and return the attention of their queries.

        It holds until the next tokens are appended.
        """
        key, value = self._encode(key, value)
        if self.recent_segment:  # later tokens are read token by token, after its end
            self.crop(0)
        if self.below_capacity and self.exceeds_capacity(key.shape[2]):
            self._start_evicting()
        if self.window is None or (key.shape[2] == 1 and not self.recording):
            self.append_keys(key, value)
            return self.attend_held
        if self.recording:  # `crop` decides which tokens are kept
            if self.recent is not None:
                key, value = torch.cat([self.recent[0], key], 2), torch.cat([self.recent[1], value], 2)
            self.recent = key.contiguous(), value.contiguous()
            return self._over_window(*self.recent)[0]
        attend, scores = self._over_window(key, value)
        self.append_keys(key, value, scores)
        return attend

    def _backend(self, query: Tensor, softmax: AttentionParams) -> backends.Backend | None:
        """The kernels that can attend; none can rotate queries back for cache-relative positions."""
        return None if self.rotary is not None else backends.backend_for(query, softmax)

    def _beats_sdpa(self, backend: backends.Backend, query: Tensor) -> bool:
        return self.padding is not None or backend.beats_sdpa(query, len(self.heads))

    def _attend_full(self, module: nn.Module, query: Tensor, softmax: AttentionParams) -> Tensor:
        """Full attention by the same call as in transformers, so an all-full plan gives the full cache's output bit for bit.

        Unless `exact`, a faster kernel is used if there is one.
        """
        batch, _, tokens, _ = query.shape
        keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        if not self.exact and self.padding is None and (backend := backends.backend_for(query, softmax)):
            found = backend.attend_full(query, keys, values, softmax.scaling)
            if found is not None:
                return found
        mask = None
        if self.padding is not None or (tokens > 1 and self.length > tokens):
            columns = torch.arange(self.length, device=query.device)
            mask = columns <= columns[self.length - tokens :, None]  # [tokens, length]
            if self.padding is not None:
                mask = mask & (columns >= self.padding.tokens[:, None, None])
            mask = mask.expand(batch, 1, tokens, self.length) if mask.dim() == 2 else mask[:, None]
        elif tokens == 1 and query.dtype != torch.float32 and query.device.type == "cpu":
            # The same bits as the call below, 5 times faster at 7,500 keys (bfloat16, 2 cores), but slower in float32.
            return attend_rows(query, keys, values, None, softmax)
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=softmax.scaling)[0].transpose(1, 2)

    def _attend_buffer(self, query: Tensor, softmax: AttentionParams) -> Tensor:
        """Attend from the last token, or from the last tokens if nothing is evicted, over the buffer in place."""
        end = self.prefix_slots + self._held()
        if backend := self._backend(query, softmax):
            if backend.is_decode_shape(query, len(self.heads)):
                return backend.decode(query, self.keys, self.values, self.visible, end, softmax)
            until = torch.where(self.visible, FOREVER, 0).flatten(0, 1)
            sight = self._sight(until, self.length - query.shape[2], self.start, self.prefix_slots)
            keys, values = self._decode(self.keys.flatten(0, 1), self.values.flatten(0, 1))
            return backend.prefill(query, keys, values, sight, softmax)
        mask = self.visible[:, :, None, :end]
        if query.shape[2] > 1:
            slots = torch.arange(end, device=query.device)
            mask = mask & (slots <= slots[end - query.shape[2] :, None])
        keys, values = self._decode(self.keys[:, :, :end], self.values[:, :, :end])
        rotated = self._rotated_queries(query, self.length - query.shape[2])
        return attend_rows(query, keys, values, mask, softmax, rotated, self.pattern.sink)

    def _over_window(self, key: Tensor, value: Tensor) -> tuple[Attend, Tensor | None]:
        """Return the attention of several tokens over the cached keys and their own. Does not change the cache.

        key, value: rows of the buffers, [batch, heads, keys, columns], the last of which belong to the queries. Also returns the
        scores of the keys that leave the window (for `append_keys`).
        """
        first, end = self.length - self._held(), self.length + key.shape[2]
        ring_keys, ring_values = self._in_order()
        keys = torch.cat([self.keys[:, :, : self.prefix_slots], ring_keys, key], 2)
        values = torch.cat([self.values[:, :, : self.prefix_slots], ring_values, value], 2)
        keys, values = self._decode(keys, values)
        until, scores = self._until(keys, values, first, end)
        return partial(self._attend_window, _Keys(keys, values, until, first, end, self.prefix_slots)), scores

    def _attend_window(self, given: _Keys, _: nn.Module, query: Tensor, softmax: AttentionParams) -> Tensor:
        """Attend from the last tokens, in blocks of queries."""
        shape, first, end = given.keys.shape[:2], given.first, given.end
        keys, values, until = (t.flatten(0, 1) for t in (given.keys, given.values, given.until))
        if backend := self._backend(query, softmax):
            sight = self._sight(until, end - query.shape[2], first, given.prefix_slots)
            return backend.prefill(query, keys, values, sight, softmax)
        columns = torch.arange(first - given.prefix_slots, end, device=keys.device)
        columns[: given.prefix_slots] = -1  # before every query
        output = torch.empty_like(query)
        for start in range(0, query.shape[2], QUERY_BLOCK):
            block = query[:, :, start : start + QUERY_BLOCK]
            begin = end - query.shape[2] + start
            queries = torch.arange(begin, begin + block.shape[2], device=keys.device)[:, None]
            rows, indices = ((until > begin) & (columns < begin + block.shape[2])).nonzero(as_tuple=True)
            counts = rows.bincount(minlength=len(until))
            most = int(counts.max())
            # The keys that any query of the block sees, per head, padded with the first key, which the mask hides.
            gathered = indices.new_zeros(len(until), most)
            valid = torch.arange(most, device=keys.device) < counts[:, None]
            gathered.masked_scatter_(valid, indices)
            mask = (columns[gathered][:, None] <= queries) & (queries < (until.gather(1, gathered) * valid)[:, None])
            heads = torch.arange(len(until), device=keys.device)[:, None]
            seen_keys, seen_values = (t[heads, gathered].unflatten(0, shape) for t in (keys, values))
            mask, rotated = mask.unflatten(0, shape), self._rotated_queries(block, begin)
            # The sink tokens are the first of the gathered keys.
            found = attend_rows(block, seen_keys, seen_values, mask, softmax, rotated, self.pattern.sink)
            output[:, :, start : start + QUERY_BLOCK] = found
        return output

    def _sight(self, until: Tensor, first: int, start: int, prefix_slots: int) -> KeyVisibility:
        """Return which keys the queries from column `first` on see: prefix slots, then columns from `start` on."""
        gaps, full = self.padding is not None or self.holes, self.window is None
        reach = prefix_slots if full else until.shape[1]
        if not full and not self.pattern.top_k:
            reach = min(reach, prefix_slots + max(0, self._first_evictable - start))
        far = prefix_slots if full else self.pattern.sink + self.pattern.top_k
        return KeyVisibility(until, first, prefix_slots, start, self.window, gaps, far, reach)

    def _rotated_queries(self, query: Tensor, first: int) -> Tensor | None:
        """Return the queries, from column `first` on, rotated for the sink tokens. None unless positions are cache-relative."""
        if self.rotary is None:
            return None
        positions = self._positions(torch.arange(first, first + query.shape[2], device=query.device))
        most = self.pattern.sink + (self.pattern.window or 0) - 1
        return rotate_back(query, (positions - most).clamp(min=0), self.rotary)

    def _until(self, keys: Tensor, values: Tensor, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Return the column from which on each key is invisible: int64 [batch, heads, keys].

        keys, values: those in the prefix slots, then those of the columns from `first` to `end`. Also returns the scores of the
        keys that leave the window, [batch, heads, columns from `first` on], or None if the group needs no scores.
        """
        window, sink, prefix_slots = self.window or 0, self.pattern.sink, self.prefix_slots
        columns = torch.arange(first, end, device=keys.device)
        positions = self._positions(columns).expand(*keys.shape[:2], end - first)
        until = torch.where(positions < sink, end, columns + window).where(positions >= 0, 0)
        seen = self._seen(first, end) if self.holes else None
        until = until if seen is None else until.where(seen, 0)
        prefix = torch.where(self.visible[:, :, :prefix_slots], end, 0)
        leaving, scores = max(0, end - window - first), None  # columns that have left at the last query
        if self.pattern.top_k and leaving:
            new = slice(prefix_slots, prefix_slots + leaving)
            scores = self._eligible_scores(self.scorer.scores(keys[:, :, new], values[:, :, new], self.weights), first)
            scores = scores if seen is None else scores.masked_fill(~seen[:, :, :leaving], NONE)
            ends = lifetimes(self.scores, scores, self.pattern.top_k) + (first + window - 1)
            slots = self.scores.shape[2]
            prefix[:, :, sink:] = torch.where(self.visible[:, :, sink:prefix_slots], ends[..., :slots], 0)
            until[:, :, :leaving] = torch.where(scores > NONE, ends[..., slots:], until[:, :, :leaving])
        return torch.cat([prefix, until], -1), scores
