"""Slots: which keys of the buffers (cache/buffers.py) are evicted, and when.

A new token goes into the ring buffer. A key that it overwrites has left the window. If it is a sink token, it moves to its sink
slot. If its importance score (eviction/scorers/linear.py) is above the lowest score of the top-k keys, it replaces that key.
Otherwise it is evicted. After a segment (dense prefill) the ring begins anew with the last tokens of the segment, and grows up
to the window of decoding before it wraps. While a text is no longer than what a head keeps (`below_capacity`), nothing is scored.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from headsink.cache.buffers import Buffers
from headsink.cache.inference_mode import outside_inference_mode
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import FOREVER, Pattern
from headsink.eviction.scorers import NONE


class Slots(Buffers):
    """Keys and values of KV heads with one pattern. Keys are evicted as tokens are appended."""

    @outside_inference_mode
    def freeze(self) -> None:
        """Stop evicting: all cached and all later keys stay visible."""
        if not self.evicts:
            return
        self.crop(0)
        self.prefix_slots, self.start, self.window, self.below_capacity = (
            self.prefix_slots + self._held(),
            self.length,
            None,
            False,
        )
        # no top-k keys are chosen any more
        self.scores, self.weights = self.scores[..., :0].clone(), self.weights[:0].clone()

    def must_evict(self, tokens: int) -> bool:
        """Whether the head evicts at the end of a segment of `tokens` tokens."""
        return self.evicts and self.exceeds_capacity(tokens, self.segment_pattern)

    def exceeds_capacity(self, tokens: int, pattern: Pattern | None = None) -> bool:
        """Whether `tokens` more tokens are more than a pattern keeps, by default that of decoding."""
        return (pattern or self.pattern).size(self.columns + tokens) < self.columns + tokens

    @outside_inference_mode
    def _start_evicting(self) -> None:
        """Move every token to its slot under the pattern. From now on keys are evicted."""
        self.below_capacity, self.window, self.prefix_slots = False, self.pattern.window, self.pattern.sink
        keys, values, seen = (t[:, :, : self.length] for t in (self.keys, self.values, self.visible))
        self.length = 0
        shape = (*keys.shape[:2], self.prefix_slots)
        self.keys, self.values = (rows.new_zeros(*shape, rows.shape[3]) for rows in (keys, values))
        self.visible = torch.zeros(shape, dtype=torch.bool, device=keys.device)
        if not self.holes:
            self.append_keys(keys, values)
            return
        scores = self._linear_scores(keys, values).masked_fill(~seen, NONE) if self.pattern.top_k else None
        self.append_keys(keys, values, scores)
        pads = (
            torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
            if self.padding is None
            else self.padding.tokens
        )
        first = (torch.arange(self.pattern.sink, device=keys.device) + pads[:, None]).clamp(max=self.length - 1)
        self.visible[:, :, : self.pattern.sink] &= seen.gather(2, first[:, None].expand(-1, len(self.heads), -1))
        columns = torch.arange(self.length - self._held(), self.length, device=keys.device)
        self.visible[:, :, self._slots(columns)] = seen[:, :, columns]

    def _linear_scores(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the scores of rows of the buffers, [batch, heads, slots], by the plan's scorer."""
        return self.scorer.scores(*self._decode(keys, values), self.weights)

    def _eligible_scores(self, scores: Tensor, first: int) -> Tensor:
        """Return `scores` of the columns from `first` on, [batch, heads, columns], with -inf for sink tokens and padding."""
        if first >= self._first_evictable:
            return scores
        positions = self._positions(torch.arange(first, first + scores.shape[2], device=scores.device))
        return scores.masked_fill(positions < self.pattern.sink, NONE)

    @property
    def _first_evictable(self) -> int:
        """The first column that is neither a sink token nor padding in any row."""
        return self.pattern.sink + (0 if self.padding is None else self.padding.most)

    @outside_inference_mode
    def append_keys(self, key: Tensor, value: Tensor, scores: Tensor | None = None) -> None:
        """Append tokens to the ring. Keys that leave the window move to a sink or top-k slot, or are evicted.

        scores: [batch, heads, columns from the first in the ring on], importance scores that replace those of the plan's scorer.
        """
        key, value = self._encode(key, value)
        tokens, end = key.shape[2], self.length + key.shape[2]
        self.make_room(tokens)
        window = end - self.start if self.window is None else self.window
        if end - window > self.length - self._held():
            self._evict(key, value, end - window, scores)
        columns = torch.arange(max(self.length, end - window), end, device=key.device)
        if tokens == 1 and window:  # an integer index is faster than a tensor
            slot = self.prefix_slots + (self.length - self.start) % window
            self.keys[:, :, slot], self.values[:, :, slot] = key[:, :, 0], value[:, :, 0]
            self.visible[:, :, slot] = True if self.padding is None else (self.length >= self.padding.tokens)[:, None]
        elif len(columns):
            new = slice(tokens - len(columns), tokens)
            slots: Tensor | slice
            if self.window is None:  # contiguous slots
                slots = slice(self.prefix_slots + self.length - self.start, self.prefix_slots + end - self.start)
            else:
                slots = self._slots(columns)
            self.keys[:, :, slots], self.values[:, :, slots] = key[:, :, new], value[:, :, new]
            real = True if self.padding is None else columns >= self.padding.tokens[:, None, None]
            self.visible[:, :, slots] = real
        self.length = end

    @outside_inference_mode
    def take(
        self, key: Tensor, value: Tensor, window: int, scores: Tensor | None = None, kept: Tensor | None = None
    ) -> None:
        """Fill an empty group with the sink tokens, the top-k keys and the last `window` tokens of a longer text without padding.

        Does not block the host. With top-k keys, scores: float [batch, heads, columns]; kept: the columns of the top-k keys,
        int64 [batch, heads, top_k].
        """
        end, sink = key.shape[2], self.pattern.sink
        columns = torch.arange(end, device=key.device).expand(*key.shape[:2], end)
        parts = [columns[..., :sink], columns[..., end - window :]]
        if scores is not None and kept is not None:
            parts.insert(1, kept)
            self.scores = scores.gather(2, kept)
        indices = torch.cat(parts, 2)
        at = indices[..., None]
        chosen = (rows.gather(2, at.expand(*indices.shape, rows.shape[3])) for rows in (key, value))
        self.keys, self.values = self._encode(*chosen)
        self.visible = torch.ones_like(indices, dtype=torch.bool)
        self.below_capacity, self.window, self.prefix_slots = False, self.pattern.window, indices.shape[2] - window
        self.start, self.length = end - window, end

    @outside_inference_mode
    def end_segment(self, key: Tensor, value: Tensor, scores: Tensor | None) -> None:
        """Append a segment and evict down to the pattern of segments.

        scores: importance scores of its keys, [batch, heads, tokens]; None: those of the plan's scorer.
        """
        key, value = self._encode(key, value)
        window, sink, top_k = self.segment_pattern.window or 0, self.pattern.sink, self.pattern.top_k
        if not self.length and self.padding is None:
            kept = None
            if top_k:
                scores = self._linear_scores(key, value) if scores is None else scores
                kept = scores[..., sink : key.shape[2] - window].topk(top_k).indices + sink
            self.take(key, value, window, scores, kept)
            return
        if self.below_capacity:
            self._start_evicting()
        begin, end = self.length - self._held(), self.length + key.shape[2]
        columns = torch.arange(begin, end, device=key.device)
        ring_keys, ring_values = self._in_order()
        if top_k and scores is not None:
            scores = torch.cat([self._linear_scores(ring_keys, ring_values), scores.to(self.scores)], 2)
        old = self.visible[:, :, self._slots(columns[: self._held()])]
        new = (self._positions(columns[self._held() :]) >= 0).expand(*key.shape[:3])
        seen = torch.cat([old, new], 2)
        if top_k:
            self._grow_top_k(end - window)
        self._evict(key, value, end - window, scores)
        last = slice(end - window - begin, end - begin)
        for name, ring in (("keys", torch.cat([ring_keys, key], 2)), ("values", torch.cat([ring_values, value], 2))):
            setattr(self, name, torch.cat([getattr(self, name)[:, :, : self.prefix_slots], ring[:, :, last]], 2))
        self.visible = torch.cat([self.visible[:, :, : self.prefix_slots], seen[:, :, last]], 2)
        self.start, self.length = end - window, end

    def _evict(self, key: Tensor, value: Tensor, until: int, scores: Tensor | None) -> None:
        """Evict the columns before `until` from the window, except sink tokens and keys that become top-k keys."""
        first, length = self.length - self._held(), self._held()
        sinks = bool(self.pattern.sink) and first < self._first_evictable
        if not self.pattern.top_k and not sinks:
            return
        if until - first == 1 and length:  # no copy
            slot = self.prefix_slots + (first - self.start) % length  # the ring is full, or `first` is its start
            keys, values = self.keys[:, :, slot : slot + 1], self.values[:, :, slot : slot + 1]
        else:
            columns = torch.arange(first, until, device=key.device)
            slots, new = self._slots(columns[:length]), slice(0, max(until - self.length, 0))
            keys = torch.cat([self.keys[:, :, slots], key[:, :, new]], 2)
            values = torch.cat([self.values[:, :, slots], value[:, :, new]], 2)
        seen = self._seen(first, until) if self.holes else None
        if sinks:
            positions = self._positions(torch.arange(first, until, device=key.device)).expand(keys.shape[:3])
            is_sink = (positions >= 0) & (positions < self.pattern.sink)
            rows, heads, found = (is_sink if seen is None else is_sink & seen).nonzero(as_tuple=True)
            target = positions[rows, heads, found]
            self.keys[rows, heads, target] = keys[rows, heads, found]
            self.values[rows, heads, target] = values[rows, heads, found]
            self.visible[rows, heads, target] = True
        if self.pattern.top_k:
            scores = self._linear_scores(keys, values) if scores is None else scores[..., : until - first]
            scores = scores if seen is None else scores.masked_fill(~seen, NONE)
            self._choose(keys, values, self._eligible_scores(scores, first))

    def _seen(self, first: int, until: int) -> Tensor:
        """Return whether columns of the ring, and new ones after them, are visible: bool [batch, heads, columns]."""
        columns = torch.arange(first, min(until, self.length), device=self.keys.device)
        return F.pad(self.visible[:, :, self._slots(columns)], (0, until - first - len(columns)), value=True)

    def _choose(self, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        """Choose the new top-k keys among the present ones and those that leave the window, [batch, heads, keys, dim]."""
        if scores.shape[2] == 1:  # no sort
            least, slot = self.scores.min(-1)
            better = scores[..., 0] > least
            if not better.any():
                return
            rows, heads = better.nonzero(as_tuple=True)
            slot, new = slot[rows, heads], torch.zeros_like(rows)
        else:
            slots = self.scores.shape[2]
            merged = torch.cat([self.scores, scores], -1)
            top = merged.topk(slots, -1, sorted=False).indices
            kept = torch.zeros_like(merged, dtype=torch.bool).scatter_(-1, top, True)
            # Every head evicts as many old keys as it keeps new ones, so the two lists correspond.
            rows, heads, slot = (~kept[..., :slots]).nonzero(as_tuple=True)
            new = kept[..., slots:].nonzero(as_tuple=True)[2]
        new_scores = scores[rows, heads, new]
        self.scores[rows, heads, slot] = new_scores
        slot = slot + self.pattern.sink
        self.keys[rows, heads, slot] = keys[rows, heads, new]
        self.values[rows, heads, slot] = values[rows, heads, new]
        self.visible[rows, heads, slot] = new_scores > NONE

    @outside_inference_mode
    def make_room(self, tokens: int, early: bool = True) -> None:
        """Make room for new tokens. Unless `early`, only for those that fit before eviction starts, but at least one."""
        if self.below_capacity and not early:
            tokens = max(1, min(tokens, self.pattern.size(FOREVER) - self.length))
        if self.below_capacity and self.exceeds_capacity(tokens):
            self._start_evicting()
        end = self.length + tokens - self.start
        self._grow(end if self.window is None else min(self.window, end))
        if self.window is not None and self.pattern.top_k and end > self.window:
            self._grow_top_k(self.length + tokens - self.window)

    def check_crop(self, tokens: int) -> None:
        """Raise if the last `tokens` tokens cannot be removed."""
        tokens -= 0 if self.recent is None else min(tokens, self.recent[0].shape[2])
        if tokens and self.window is None and tokens > self.length - self.start:
            raise HeadsinkError(
                f"cannot take back {tokens} tokens: freeze() was called {self.length - self.start} tokens ago, and the "
                "tokens before it are kept"
            )
        if tokens and self.window is not None and (self.start or self.length > self.window):
            raise HeadsinkError(
                f"cannot take back {tokens} tokens: a window of {self.window} has evicted older ones; pass a "
                "cache of your own (headsink.new_cache) and call its activate_past_recording() first"
            )

    @outside_inference_mode
    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` tokens. If they pushed others out of the window, this works only while recording."""
        self.check_crop(tokens)
        if self.recent is not None:
            key, value = self.recent
            left = key.shape[2] - tokens
            if left >= 0:
                scores, self.recent, self.recent_scores = self.recent_scores, None, None
                segment, self.recent_segment = self.recent_segment and left > 1 and self.must_evict(left), False
                if segment:
                    scores = None if scores is None else scores[:, :, :left]
                    self.end_segment(key[:, :, :left], value[:, :, :left], scores)
                else:
                    self.append_keys(key[:, :, :left], value[:, :, :left])
                return
            self.recent, tokens = None, -left
        self.length -= tokens
        if self.padding is not None and self.padding.hidden is not None:
            self.padding = replace(self.padding, hidden=self.padding.hidden[:, : self.length])
