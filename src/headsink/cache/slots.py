"""Slots: the buffers of cached keys and values of the heads with one pattern.

One buffer of keys and one of values, [batch, heads, slots, dim]:

    | sink tokens | top-k keys |  the last `window` tokens, as a ring: column c in slot (c - start) % window  |

A new token goes into the ring buffer. A key that it overwrites has left the window. If it is a sink token, it moves to its sink
slot. If its importance score (eviction/scorers/linear.py) is above the lowest score of the top-k keys, it replaces that key.
Otherwise it is evicted. After a segment (dense prefill) the ring begins anew with the last tokens of the segment, and grows up
to the window of decoding before it wraps. The ring of a full head never wraps, nor does any ring after `freeze`, when it starts
after all cached keys. While a text is no longer than what a head keeps (`below_capacity`), the ring does not wrap either, and
nothing is scored. The order of the slots does not matter, because the keys are already rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from headsink.attention.params import Padding
from headsink.cache.inference_mode import outside_inference_mode
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import FOREVER, Pattern
from headsink.eviction.scorers import LINEAR, NONE, Scorer
from headsink.models.rope import Rotary
from headsink.utils import device

GROWTH = 128  # slots by which a ring grows until it is as long as its window


class Slots:
    """Keys and values of the KV heads `heads` of one layer, all with `pattern`, which they keep at the end of a segment.

    decode_window: the window at least while decoding; `self.pattern` has it.
    weights: scorer weights, [KV heads of the layer, features]. rotary: how the layer rotates queries, for cache-relative
    positions (models/rope.py), else None. exact: heads with full attention use the same call as transformers where `sdpa` can
    express it, even if a kernel is faster. scorer: of the weights. Columns count from the start of the batch, positions from a
    row's first real token.
    """

    @outside_inference_mode
    def __init__(
        self,
        pattern: Pattern,
        heads: list[int],
        weights: Tensor,
        key: Tensor,
        padding: Padding | None,
        rotary: Rotary | None = None,
        exact: bool = True,
        scorer: Scorer = LINEAR,
        decode_window: int = 0,
    ):
        self.segment_pattern, self.pattern = pattern, pattern.widen(decode_window)
        self.heads, self.exact, self.scorer = heads, exact, scorer
        self.rotary = rotary if pattern.sink else None
        self.below_capacity = not pattern.full and self.rotary is None
        self.window = None if self.below_capacity else pattern.window  # None: nothing is evicted
        # slots before the ring; grows by those of top-k keys
        self.prefix_slots = 0 if self.below_capacity else pattern.sink
        self.start = 0  # column in the first slot of the ring, before it wraps
        self.padding = padding
        shape = (key.shape[0], len(heads), self.prefix_slots, key.shape[3])
        self.keys, self.values = key.new_zeros(shape), key.new_zeros(shape)
        self.visible = torch.zeros(shape[:3], dtype=torch.bool, device=key.device)
        kind = torch.promote_types(key.dtype, torch.float32)
        self.scores = torch.full((*shape[:2], 0), NONE, dtype=kind, device=key.device)
        self.index = device.index(heads, key.device)
        weights = device.on_card(weights, key.device)
        self.weights = weights[self.index] if pattern.top_k else weights[:0]
        self.length = 0  # columns appended so far
        self.recording = False
        self.holes = False  # whether columns were hidden from a row (`hide`)
        self.recent: tuple[Tensor, Tensor] | None = None  # while recording: keys and values that `crop` may remove
        self.recent_scores: Tensor | None = None  # importance scores of a prompt among them
        self.recent_segment = False  # whether they are a segment

    # contents

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

    @property
    def evicts(self) -> bool:
        """Whether keys are evicted, now or later."""
        return self.below_capacity or self.window is not None

    @property
    def columns(self) -> int:
        """The number of columns appended so far, with those that `crop` may remove."""
        return self.length + (0 if self.recent is None else self.recent[0].shape[2])

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
        shape = (*keys.shape[:2], self.prefix_slots, keys.shape[3])
        self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        self.visible = torch.zeros(shape[:3], dtype=torch.bool, device=keys.device)
        if not self.holes:
            self.append_keys(keys, values)
            return
        scores = self.scorer.scores(keys, values, self.weights).masked_fill(~seen, NONE) if self.pattern.top_k else None
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

    def begin(self, column: int) -> None:
        """Start an empty window at a column, as if all before it had left."""
        self.below_capacity, self.window, self.prefix_slots = False, self.pattern.window, self.pattern.sink
        self.start = self.length = column

    def _held(self) -> int:
        """Return the number of columns in the ring."""
        columns = self.length - self.start
        return columns if self.window is None else min(columns, self.window)

    def _slots(self, columns: Tensor) -> Tensor:
        columns = columns - self.start
        return self.prefix_slots + (columns if self.window is None else columns % max(self.window, 1))

    def _in_order(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the ring, oldest first."""
        columns = torch.arange(self.length - self._held(), self.length, device=self.keys.device)
        slots = self._slots(columns)
        return self.keys[:, :, slots], self.values[:, :, slots]

    def _positions(self, columns: Tensor) -> Tensor:
        """Return positions from the first real token: [keys], or [batch, 1, keys] with padding, where they are negative."""
        return columns if self.padding is None else columns - self.padding.tokens[:, None, None]

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
        at = indices[..., None].expand(*indices.shape, key.shape[3])
        self.keys, self.values = key.gather(2, at), value.gather(2, at)
        self.visible = torch.ones_like(indices, dtype=torch.bool)
        self.below_capacity, self.window, self.prefix_slots = False, self.pattern.window, indices.shape[2] - window
        self.start, self.length = end - window, end

    @outside_inference_mode
    def end_segment(self, key: Tensor, value: Tensor, scores: Tensor | None) -> None:
        """Append a segment and evict down to the pattern of segments.

        scores: importance scores of its keys, [batch, heads, tokens]; None: those of the plan's scorer.
        """
        window, sink, top_k = self.segment_pattern.window or 0, self.pattern.sink, self.pattern.top_k
        if not self.length and self.padding is None:
            kept = None
            if top_k:
                scores = self.scorer.scores(key, value, self.weights) if scores is None else scores
                kept = scores[..., sink : key.shape[2] - window].topk(top_k).indices + sink
            self.take(key, value, window, scores, kept)
            return
        if self.below_capacity:
            self._start_evicting()
        begin, end = self.length - self._held(), self.length + key.shape[2]
        columns = torch.arange(begin, end, device=key.device)
        ring_keys, ring_values = self._in_order()
        if top_k and scores is not None:
            scores = torch.cat([self.scorer.scores(ring_keys, ring_values, self.weights), scores.to(self.scores)], 2)
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
            scores = self.scorer.scores(keys, values, self.weights) if scores is None else scores[..., : until - first]
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

    @property
    def room(self) -> int:
        """The first column for which the buffers must grow; FOREVER if they never need to."""
        ring, until = self.keys.shape[2] - self.prefix_slots, FOREVER
        if self.window is None:
            return min(self.start + ring, self.pattern.size(FOREVER) if self.below_capacity else FOREVER)
        if ring < self.window:
            until = self.start + ring
        if self.scores.shape[2] < self.pattern.top_k:
            until = min(until, self.window + max(self.start, self.scores.shape[2]))
        return until

    def _grow(self, needed: int) -> None:
        """Grow the ring to at least `needed` slots, in steps of `GROWTH`, up to its final size."""
        slots = self.keys.shape[2] - self.prefix_slots
        if needed <= slots:
            return
        slots = -(-needed // GROWTH) * GROWTH
        if self.below_capacity or self.window is not None:
            slots = min(slots, self.pattern.size(FOREVER) if self.window is None else self.window)
        self._insert(self.keys.shape[2], self.prefix_slots + slots - self.keys.shape[2])

    def _grow_top_k(self, candidates: int) -> None:
        """Make room for the top-k keys among `candidates` columns, in steps of `GROWTH`, to save memory for short texts."""
        more = min(-(-candidates // GROWTH) * GROWTH, self.pattern.top_k) - self.scores.shape[2]
        if more > 0:
            self._insert(self.prefix_slots, more)
            self.prefix_slots += more
            self.scores = F.pad(self.scores, (0, more), value=NONE)

    def _insert(self, index: int, slots: int) -> None:
        """Insert empty slots into the buffers."""

        def grow(buffer: Tensor) -> Tensor:
            empty = buffer.new_zeros(*buffer.shape[:2], slots, *buffer.shape[3:])
            return empty if not buffer.shape[2] else torch.cat([buffer[:, :, :index], empty, buffer[:, :, index:]], 2)

        self.keys, self.values, self.visible = grow(self.keys), grow(self.values), grow(self.visible)

    # operations of a transformers cache

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

    @outside_inference_mode
    def hide(self, hidden: Tensor) -> None:
        """Hide some of the last columns: bool [batch, columns]. They still count in the window."""
        if self.window is not None and self.pattern.sink:
            self.visible[:, :, : self.pattern.sink] &= ~self._sinks(hidden)[:, None]
        hidden = hidden[:, max(0, hidden.shape[1] - self._held()) :]
        columns = torch.arange(self.length - hidden.shape[1], self.length, device=hidden.device)
        self.visible[:, :, self._slots(columns)] &= ~hidden[:, None]
        self.holes = True

    def _sinks(self, hidden: Tensor) -> Tensor:
        """Return which sink tokens outside the window are hidden: bool [batch, sink]. hidden: bool [batch, all columns]."""
        columns = torch.arange(self.pattern.sink, device=hidden.device).expand(len(hidden), -1)
        columns = columns if self.padding is None else columns + self.padding.tokens[:, None]
        left = columns < self.length - self._held()
        return hidden.gather(1, columns.clamp(max=hidden.shape[1] - 1)) & left

    def check_hide(self, hidden: Tensor) -> None:
        """Raise if columns to hide may be top-k keys, whose columns are not recorded."""
        outside = hidden[:, : max(0, hidden.shape[1] - self._held())]
        positions = self._positions(torch.arange(outside.shape[1], device=outside.device).view(1, 1, -1))[:, 0]
        if self.window is not None and self.pattern.top_k and (outside & (positions >= self.pattern.sink)).any():
            raise HeadsinkError(
                f"attention_mask hides tokens that have left a window of {self.window}, and may be among the top-k "
                "keys: start such a row with a new cache"
            )

    def last(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the last columns of a group that does not evict: [batch, heads, columns, dim]."""
        end = self.prefix_slots + self.length - self.start
        return self.keys[:, :, end - columns : end], self.values[:, :, end - columns : end]

    @outside_inference_mode
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the batch dimension of all tensors."""

        def apply(tensor: Tensor) -> Tensor:
            found = change(tensor)
            # `repeat_interleave` returns a view, and a view from `no_grad` cannot be written to outside of it.
            return found if found._base is None else found.clone()

        self.keys, self.values, self.visible = apply(self.keys), apply(self.values), apply(self.visible)
        self.scores = apply(self.scores)
        if self.recent is not None:
            self.recent = change(self.recent[0]), change(self.recent[1])
        if self.recent_scores is not None:
            self.recent_scores = change(self.recent_scores)
        if self.padding is not None:
            self.padding = self.padding.map_rows(change)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.keys, self.values, self.visible, self.scores, self.weights)
        if self.recent is not None:
            yield from self.recent
        if self.padding is not None:
            yield self.padding.tokens
