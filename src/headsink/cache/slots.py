"""The keys and values that heads with one pattern hold, and the slots that they lie in.

One buffer of keys and one of values, [batch, heads, slots, dim], and nothing else of that size:

    | sink tokens | top-k keys |  the last `window` tokens, as a ring: column c in slot c % window  |

A token enters the ring. When it is overwritten it has left the window: it moves to a slot on the left if it is one of
the row's first tokens, or in place of the top-k key with the lowest score if its own is higher (scores.py); otherwise
it is gone. A full head is a ring that never wraps, and after `freeze` so is every other, behind all that was held then. So
is every head, too, while its text is no longer than what it keeps (`below_capacity`): nothing is scored before something
must go. Slots are in no order; softmax does not mind, because rotary positions are already in the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headsink.attention.params import Padding
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import FOREVER, Pattern
from headsink.eviction.scoring import NONE, key_scores
from headsink.utils import device

Method = TypeVar("Method", bound=Callable[..., Any])

GROWTH = 128  # slots that a ring grows by until it is as long as its window


def lasting(method: Method) -> Method:
    """Let a method make its tensors as if outside `torch.inference_mode`: what a cache holds may be used later without it."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return cast(Method, run)


class Slots:
    """Keys and values of the KV heads `heads` of one layer, which share `pattern`.

    weights: [KV heads of the layer, features], of the keys' scores. inverse: where positions are counted in the cache, the
    rotary pairs' inverse frequencies (rotary.py). exact: whether heads that keep everything attend by the very call that
    transformers makes, where `sdpa` can express it, even if a kernel is sooner. Columns count from the start of the batch,
    positions from the row's first real token; the window is the same in both.
    """

    @lasting
    def __init__(
        self,
        pattern: Pattern,
        heads: list[int],
        weights: Tensor,
        key: Tensor,
        padding: Padding | None,
        inverse: Tensor | None = None,
        exact: bool = True,
    ):
        self.pattern, self.heads, self.exact = pattern, heads, exact
        self.inverse = inverse if pattern.sink else None
        self.below_capacity = not pattern.full and self.inverse is None
        self.window = None if self.below_capacity else pattern.window  # None: nothing is let go
        self.prefix_slots = (
            0 if self.below_capacity else pattern.sink
        )  # slots left of the ring, for top-k keys when there are any
        self.start = 0  # column in the first slot of a ring that never wraps
        self.padding = padding
        shape = (key.shape[0], len(heads), self.prefix_slots, key.shape[3])
        self.keys, self.values = key.new_zeros(shape), key.new_zeros(shape)
        self.visible = torch.zeros(shape[:3], dtype=torch.bool, device=key.device)
        kind = torch.promote_types(key.dtype, torch.float32)
        self.scores = torch.full((*shape[:2], 0), NONE, dtype=kind, device=key.device)
        self.index = device.index(heads, key.device)
        weights = device.on_card(weights, key.device)
        self.weights = weights[self.index] if pattern.top_k else weights[:0]
        self.length = 0  # columns that have entered the ring
        self.recording = False
        self.holes = False  # whether there are columns that a row does not see (`hide`)
        self.recent: tuple[Tensor, Tensor] | None = None  # while recording: tokens that may still be taken back

    # what is held

    @lasting
    def freeze(self) -> None:
        """From now on nothing is let go: what is held stays visible, and every later token is kept."""
        if not self.evicts:
            return
        self.crop(0)
        self.prefix_slots, self.start, self.window, self.below_capacity = (
            self.prefix_slots + self._held(),
            self.length,
            None,
            False,
        )
        self.scores, self.weights = self.scores[..., :0].clone(), self.weights[:0].clone()  # nothing is chosen any more

    @property
    def evicts(self) -> bool:
        """Whether keys are let go, now or later."""
        return self.below_capacity or self.window is not None

    def outgrown(self, tokens: int) -> bool:
        """Whether with so many more tokens there are more than are kept."""
        return self.pattern.size(self.length + tokens) < self.length + tokens

    @lasting
    def _start_evicting(self) -> None:
        """Give each token its place; from now on keys are let go."""
        self.below_capacity, self.window, self.prefix_slots = False, self.pattern.window, self.pattern.sink
        keys, values, seen = (t[:, :, : self.length] for t in (self.keys, self.values, self.visible))
        self.length = 0
        shape = (*keys.shape[:2], self.prefix_slots, keys.shape[3])
        self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        self.visible = torch.zeros(shape[:3], dtype=torch.bool, device=keys.device)
        if not self.holes:
            self.append_keys(keys, values)
            return
        scores = key_scores(keys, values, self.weights).masked_fill(~seen, NONE) if self.pattern.top_k else None
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

    def _held(self) -> int:
        """Columns in the ring."""
        return self.length - self.start if self.window is None else min(self.length, self.window)

    def _slots(self, columns: Tensor) -> Tensor:
        return self.prefix_slots + (columns - self.start if self.window is None else columns % max(self.window, 1))

    def _in_order(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the ring, oldest first."""
        columns = torch.arange(self.length - self._held(), self.length, device=self.keys.device)
        slots = self._slots(columns)
        return self.keys[:, :, slots], self.values[:, :, slots]

    def _positions(self, columns: Tensor) -> Tensor:
        """Positions in the row's text: [keys], or [batch, 1, keys] with padding, where they are negative."""
        return columns if self.padding is None else columns - self.padding.tokens[:, None, None]

    def _eligible(self, scores: Tensor, first: int) -> Tensor:
        """Scores of the keys of columns from `first` on, [batch, heads, columns]: -inf for sink tokens and padding."""
        if first >= self._ordinary:
            return scores
        positions = self._positions(torch.arange(first, first + scores.shape[2], device=scores.device))
        return scores.masked_fill(positions < self.pattern.sink, NONE)

    @property
    def _ordinary(self) -> int:
        """The first column that is neither sink token nor padding in any row."""
        return self.pattern.sink + (0 if self.padding is None else self.padding.most)

    @lasting
    def append_keys(self, key: Tensor, value: Tensor, scores: Tensor | None = None) -> None:
        """Take tokens into the ring; those that they push out of the window move left or are dropped.

        scores: [batch, heads, columns], of those from the first in the ring on, in place of the keys' own.
        """
        tokens, end = key.shape[2], self.length + key.shape[2]
        self.make_room(tokens)
        window = end - self.start if self.window is None else self.window
        if end - window > self.length - self._held():
            self._leave(key, value, end - window, scores)
        columns = torch.arange(max(self.length, end - window), end, device=key.device)
        if tokens == 1 and window:  # a slice is sooner written than an index
            slot = self.prefix_slots + (self.length - self.start) % window
            self.keys[:, :, slot], self.values[:, :, slot] = key[:, :, 0], value[:, :, 0]
            self.visible[:, :, slot] = True if self.padding is None else (self.length >= self.padding.tokens)[:, None]
        elif len(columns):
            new = slice(tokens - len(columns), tokens)
            slots: Tensor | slice
            if self.window is None:  # one after the other
                slots = slice(self.prefix_slots + self.length - self.start, self.prefix_slots + end - self.start)
            else:
                slots = self._slots(columns)
            self.keys[:, :, slots], self.values[:, :, slots] = key[:, :, new], value[:, :, new]
            real = True if self.padding is None else columns >= self.padding.tokens[:, None, None]
            self.visible[:, :, slots] = real
        self.length = end

    @lasting
    def take(self, key: Tensor, value: Tensor, scores: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Take a whole text, longer than what is kept of it, without padding, into an empty group. The host waits for nothing.

        Where there are top-k keys, scores: float [batch, heads, columns]; kept: their columns, int64 [batch, heads, top_k].
        """
        end, sink, window = key.shape[2], self.pattern.sink, self.pattern.window or 0
        columns = torch.arange(end, device=key.device).expand(*key.shape[:2], end)
        wrapped = end - end % max(window, 1)  # the column in the ring's first slot
        parts = [columns[..., :sink], columns[..., wrapped:], columns[..., end - window : wrapped]]
        if scores is not None and kept is not None:
            parts.insert(1, kept)
            self.scores = scores.gather(2, kept)
        places = torch.cat(parts, 2)
        at = places[..., None].expand(*places.shape, key.shape[3])
        self.keys, self.values = key.gather(2, at), value.gather(2, at)
        self.visible = torch.ones_like(places, dtype=torch.bool)
        self.below_capacity, self.window, self.prefix_slots, self.length = False, window, places.shape[2] - window, end

    def _leave(self, key: Tensor, value: Tensor, until: int, scores: Tensor | None) -> None:
        """Columns before `until` leave the window: keep the first tokens, and the best scored others, among them."""
        first, held = self.length - self._held(), self._held()
        sinks = bool(self.pattern.sink) and first < self._ordinary
        if not self.pattern.top_k and not sinks:
            return
        if until - first == 1 and held:  # no copy
            slot = self.prefix_slots + first % held  # the ring is full, or `first` is 0
            keys, values = self.keys[:, :, slot : slot + 1], self.values[:, :, slot : slot + 1]
        else:
            columns = torch.arange(first, until, device=key.device)
            slots, new = self._slots(columns[:held]), slice(0, max(until - self.length, 0))
            keys = torch.cat([self.keys[:, :, slots], key[:, :, new]], 2)
            values = torch.cat([self.values[:, :, slots], value[:, :, new]], 2)
        seen = self._seen(first, until) if self.holes else None
        if sinks:
            positions = self._positions(torch.arange(first, until, device=key.device)).expand(keys.shape[:3])
            early = (positions >= 0) & (positions < self.pattern.sink)
            rows, heads, found = (early if seen is None else early & seen).nonzero(as_tuple=True)
            target = positions[rows, heads, found]
            self.keys[rows, heads, target] = keys[rows, heads, found]
            self.values[rows, heads, target] = values[rows, heads, found]
            self.visible[rows, heads, target] = True
        if self.pattern.top_k:
            scores = key_scores(keys, values, self.weights) if scores is None else scores[..., : until - first]
            scores = scores if seen is None else scores.masked_fill(~seen, NONE)
            self._choose(keys, values, self._eligible(scores, first))

    def _seen(self, first: int, until: int) -> Tensor:
        """Whether columns of the ring, and new ones after them, are seen: bool [batch, heads, columns]."""
        held = torch.arange(first, min(until, self.length), device=self.keys.device)
        return F.pad(self.visible[:, :, self._slots(held)], (0, until - first - len(held)), value=True)

    def _choose(self, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        """Of the top-k keys and those that leave now, [batch, heads, keys, dim], keep those with the highest scores."""
        if scores.shape[2] == 1:  # no sort
            least, slot = self.scores.min(-1)
            better = scores[..., 0] > least
            if not better.any():
                return
            rows, heads = better.nonzero(as_tuple=True)
            slot, new = slot[rows, heads], torch.zeros_like(rows)
        else:
            slots = self.scores.shape[2]
            every = torch.cat([self.scores, scores], -1)
            top = every.topk(slots, -1, sorted=False).indices
            kept = torch.zeros_like(every, dtype=torch.bool).scatter_(-1, top, True)
            # Of every head as many held ones go as new ones stay, so that the two lists are of one length and in step.
            rows, heads, slot = (~kept[..., :slots]).nonzero(as_tuple=True)
            new = kept[..., slots:].nonzero(as_tuple=True)[2]
        worth = scores[rows, heads, new]
        self.scores[rows, heads, slot] = worth
        slot = slot + self.pattern.sink
        self.keys[rows, heads, slot] = keys[rows, heads, new]
        self.values[rows, heads, slot] = values[rows, heads, new]
        self.visible[rows, heads, slot] = worth > NONE

    @lasting
    def make_room(self, tokens: int, early: bool = True) -> None:
        """Make room for tokens that are about to enter; not early: only for those before something must go, but at least one."""
        if self.below_capacity and not early:
            tokens = max(1, min(tokens, self.pattern.size(FOREVER) - self.length))
        if self.below_capacity and self.outgrown(tokens):
            self._start_evicting()
        end = self.length + tokens - self.start
        self._grow(end if self.window is None else min(self.window, end))
        if self.window is not None and self.pattern.top_k and end > self.window:
            self._grow_top_k(end - self.window)

    @property
    def room(self) -> int:
        """The first column that there is no room for, as many as may come if the buffers need not grow any more."""
        ring, until = self.keys.shape[2] - self.prefix_slots, FOREVER
        if self.window is None:
            return min(self.start + ring, self.pattern.size(FOREVER) if self.below_capacity else FOREVER)
        if ring < self.window:
            until = ring
        if self.scores.shape[2] < self.pattern.top_k:
            until = min(until, self.window + self.scores.shape[2])
        return until

    def _grow(self, needed: int) -> None:
        """Make the ring at least `needed` slots long, in steps, up to as many as are ever kept in it."""
        slots = self.keys.shape[2] - self.prefix_slots
        if needed <= slots:
            return
        slots = -(-needed // GROWTH) * GROWTH
        if self.below_capacity or self.window is not None:
            slots = min(slots, self.pattern.size(FOREVER) if self.window is None else self.window)
        self._insert(self.keys.shape[2], self.prefix_slots + slots - self.keys.shape[2])

    def _grow_top_k(self, gone: int) -> None:
        """Make room for the top-k keys among the first `gone` columns, in steps, so that a short text holds no empty slots."""
        more = min(-(-gone // GROWTH) * GROWTH, self.pattern.top_k) - self.scores.shape[2]
        if more > 0:
            self._insert(self.prefix_slots, more)
            self.prefix_slots += more
            self.scores = F.pad(self.scores, (0, more), value=NONE)

    def _insert(self, place: int, slots: int) -> None:
        """Put empty slots into the buffer."""

        def wider(held: Tensor) -> Tensor:
            empty = held.new_zeros(*held.shape[:2], slots, *held.shape[3:])
            return empty if not held.shape[2] else torch.cat([held[:, :, :place], empty, held[:, :, place:]], 2)

        self.keys, self.values, self.visible = wider(self.keys), wider(self.values), wider(self.visible)

    # what transformers asks of a cache

    def check_crop(self, tokens: int) -> None:
        """Raise if the last `tokens` tokens cannot be taken back. Nothing is changed."""
        tokens -= 0 if self.recent is None else min(tokens, self.recent[0].shape[2])
        if tokens and self.window is None and tokens > self.length - self.start:
            raise HeadsinkError(
                f"cannot take back {tokens} tokens: hold() was called {self.length - self.start} tokens ago, and what was "
                "held then stays"
            )
        if tokens and self.window is not None and self.length > self.window:
            raise HeadsinkError(
                f"cannot take back {tokens} tokens: a window of {self.window} has evicted older ones; pass a "
                "cache of your own (headsink.new_cache) and call its activate_past_recording() first"
            )

    @lasting
    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` tokens. Those that pushed others out can be taken back only while recording."""
        self.check_crop(tokens)
        if self.recent is not None:
            key, value = self.recent
            left = key.shape[2] - tokens
            if left >= 0:
                self.recent = None
                self.append_keys(key[:, :, :left], value[:, :, :left])
                return
            self.recent, tokens = None, -left
        self.length -= tokens
        if self.padding is not None and self.padding.hidden is not None:
            self.padding = replace(self.padding, hidden=self.padding.hidden[:, : self.length])

    @lasting
    def hide(self, hidden: Tensor) -> None:
        """Of the last columns, those that a row is not to see: bool [batch, columns]. Each still takes its place in the
        window."""
        if self.window is not None and self.pattern.sink:
            self.visible[:, :, : self.pattern.sink] &= ~self._sinks(hidden)[:, None]
        hidden = hidden[:, max(0, hidden.shape[1] - self._held()) :]
        columns = torch.arange(self.length - hidden.shape[1], self.length, device=hidden.device)
        self.visible[:, :, self._slots(columns)] &= ~hidden[:, None]
        self.holes = True

    def _sinks(self, hidden: Tensor) -> Tensor:
        """Which sink tokens that have left the window are among hidden columns, bool [batch, all columns]: bool [batch, sink]."""
        columns = torch.arange(self.pattern.sink, device=hidden.device).expand(len(hidden), -1)
        columns = columns if self.padding is None else columns + self.padding.tokens[:, None]
        left = columns < self.length - self._held()
        return hidden.gather(1, columns.clamp(max=hidden.shape[1] - 1)) & left

    def check_hide(self, hidden: Tensor) -> None:
        """Raise if columns that are to be hidden may be among the top-k keys, where nothing tells which they are."""
        gone = hidden[:, : max(0, hidden.shape[1] - self._held())]
        positions = self._positions(torch.arange(gone.shape[1], device=gone.device).view(1, 1, -1))[:, 0]
        if self.window is not None and self.pattern.top_k and (gone & (positions >= self.pattern.sink)).any():
            raise HeadsinkError(
                f"attention_mask hides tokens that have left a window of {self.window}, and may be among the top-k "
                "keys: start such a row with a new cache"
            )

    def last(self, columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last columns, of a group that lets nothing go: [batch, heads, columns, dim]."""
        end = self.prefix_slots + self.length - self.start
        return self.keys[:, :, end - columns : end], self.values[:, :, end - columns : end]

    @lasting
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the batch dimension of all that is held."""

        def changed(held: Tensor) -> Tensor:
            found = change(held)
            # `repeat_interleave` gives a view, and one from `no_grad` cannot be written to outside of it.
            return found if found._base is None else found.clone()

        self.keys, self.values, self.visible = changed(self.keys), changed(self.values), changed(self.visible)
        self.scores = changed(self.scores)
        if self.recent is not None:
            self.recent = change(self.recent[0]), change(self.recent[1])
        if self.padding is not None:
            self.padding = self.padding.map_rows(change)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.keys, self.values, self.visible, self.scores, self.weights)
        if self.recent is not None:
            yield from self.recent
        if self.padding is not None:
            yield self.padding.tokens
