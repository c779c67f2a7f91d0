"""The keys and values of KV heads that share a pattern, and attention over them.

A `HeadGroup` owns one buffer of keys and one of values, [batch, heads, slots, dim], and nothing else of that size:

    | sink tokens | floating keys |  the last `window` tokens, as a ring: column c in slot c % window  |

A token enters the ring. When it is overwritten it has left the window: it moves to a slot on the left if it is one of
the row's first tokens, or in place of the floating key with the lowest score if its own is higher (scores.py); otherwise
it is gone. A full head is a ring that never wraps, and after `hold` so is every other, behind all that was held then. So is every
head, too, while its text is no longer than what it keeps (`young`): nothing is scored before something must go. Slots
are in no order; softmax does not mind, because rotary positions are already in the keys.

One token at a time attends to the buffer as it lies, without a copy. Of several tokens (prefill, verification) it is
settled first from which query on each key is seen no more; then they go through in blocks, each over the keys that its queries
see, so that a window costs its area and not its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headsink.errors import HeadsinkError
from headsink.pattern import Pattern
from headsink.rotary import turned_back
from headsink.rows import FEW, attend_few, attend_rows, attend_tiles, attend_turned, can_run
from headsink.scores import NONE, key_scores, lifetimes

QUERY_BLOCK = 256  # queries of a windowed head handled at once: the fastest of 128, 256, 512 on 2 cores
FOREVER = 2**31 - 1  # a column that never comes, also as int32
GROWTH = 128  # slots that a ring grows by until it is as long as its window


@dataclass(frozen=True)
class Padding:
    """Left padding of a batch: tokens to skip in each row, int64 [batch], and the largest of them."""

    tokens: Tensor
    most: int


class HeadGroup:
    """Keys and values of the KV heads `heads` of one layer, which share `pattern`.

    weights: [KV heads of the layer, features], of the keys' scores. inverse: where positions are counted in the cache, the
    rotary pairs' inverse frequencies (rotary.py). exact: whether heads that keep everything attend by the very call that
    transformers makes, even where a kernel is sooner. Columns count from the start of the batch, positions from the row's first
    real token; the window is the same in both.
    """

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
        self.young = not pattern.full and self.inverse is None
        self.window = None if self.young else pattern.window  # None: nothing is let go
        self.anchors = 0 if self.young else pattern.sink  # slots left of the ring, for floating keys when there are any
        self.start = 0  # column in the first slot of a ring that never wraps
        self.padding = padding
        shape = (key.shape[0], len(heads), self.anchors, key.shape[3])
        self.keys, self.values = key.new_zeros(shape), key.new_zeros(shape)
        self.visible = torch.zeros(shape[:3], dtype=torch.bool, device=key.device)
        kind = torch.promote_types(key.dtype, torch.float32)
        self.scores = torch.full((*shape[:2], 0), NONE, dtype=kind, device=key.device)
        self.weights = weights[heads if pattern.floating else []].to(key.device)
        self.length = 0  # columns that have entered the ring
        self.recording = False
        self.holes = False  # whether there are columns that a row does not see (`hide`)
        self.recent: tuple[Tensor, Tensor] | None = None  # while recording: tokens that may still be taken back

    # attention

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Let in new tokens and attend from them.

        query: [batch, heads x group, tokens, dim], key and value: [batch, heads, tokens, dim]. Returns
        [batch, heads x group, tokens, dim].
        """
        if self.young and self._outgrown(query.shape[2]):
            self._settle()
        compiled, whole = self.inverse is None and can_run(query), self.pattern.full or self.young
        if whole and not self.holes and not (compiled and (self.young or not self.exact)):
            self.enter(key, value)
            return self._attend_full(module, query, scaling)
        if self.recording and self.window is not None:
            return self._attend_recording(query, key, value, scaling)
        if query.shape[2] == 1 or (compiled and self.window is None):
            self.enter(key, value)
            return self._attend_buffer(query, scaling)
        output, start = torch.empty_like(query), 0
        if not self.length and self.padding is None and self.window is not None and not compiled:
            # The first queries of a text see all that is before them.
            start = self.pattern.size(query.shape[2])
            new = query[:, :, :start], key[:, :, :start], value[:, :, :start]
            if start:
                output[:, :, :start] = sdpa_attention_forward(module, *new, None, scaling=scaling)[0].transpose(1, 2)
                self.enter(*new[1:])
        if self.window is not None:
            if start < query.shape[2]:
                rest = query[:, :, start:], key[:, :, start:], value[:, :, start:]
                output[:, :, start:], scores = self._attend_tokens(*rest, scaling)
                self.enter(*rest[1:], scores)
            return output
        for start in range(0, query.shape[2], QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            self.enter(key[:, :, block], value[:, :, block])
            output[:, :, block] = self._attend_buffer(query[:, :, block], scaling)
        return output

    def _attend_full(self, module: nn.Module, query: Tensor, scaling: float) -> Tensor:
        """Full attention by the very call that transformers makes, so that an all-full plan is the model itself."""
        batch, _, tokens, _ = query.shape
        keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        mask = None
        if self.padding is not None or (tokens > 1 and self.length > tokens):
            columns = torch.arange(self.length, device=query.device)
            mask = columns <= columns[self.length - tokens :, None]  # [tokens, length]
            if self.padding is not None:
                mask = mask & (columns >= self.padding.tokens[:, None, None])
            mask = mask.expand(batch, 1, tokens, self.length) if mask.dim() == 2 else mask[:, None]
        elif tokens == 1 and query.dtype != torch.float32:
            # The same bits as the call below, 5 times sooner at 7,500 keys (bfloat16, 2 cores); in float32 it is slower.
            return attend_rows(query, keys, values, None, scaling)
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0].transpose(1, 2)

    def _attend_buffer(self, query: Tensor, scaling: float) -> Tensor:
        """The last token over the buffer as it lies, or the last tokens if nothing is let go."""
        end = self.anchors + self._held()
        if self.inverse is None and can_run(query):
            if query.shape[2] <= FEW:
                return attend_few(query, self.keys, self.values, self.visible, end, scaling)
            columns = torch.arange(self.start - self.anchors, self.start - self.anchors + self.keys.shape[2])
            columns[: self.anchors] = -1  # before every query
            until = torch.where(self.visible, FOREVER, 0).flatten(0, 1)
            keys, values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
            return attend_tiles(query, keys, values, columns, until, self.length - query.shape[2], scaling)
        mask = self.visible[:, :, None, :end]
        if self.inverse is not None:
            turned = self._turned(query, self.length - query.shape[2])
            keys, values = self.keys[:, :, :end], self.values[:, :, :end]
            return attend_turned(query, turned, self.pattern.sink, keys, values, mask, scaling)
        if query.shape[2] > 1:
            slots = torch.arange(end, device=query.device)
            mask = mask & (slots <= slots[end - query.shape[2] :, None])
        return attend_rows(query, self.keys[:, :, :end], self.values[:, :, :end], mask, scaling)

    def _attend_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor | None]:
        """Several tokens of a windowed head over what is held and themselves, in blocks. Nothing enters.

        query: [batch, heads x group, tokens, dim]; key, value: [batch, heads, these tokens or more, dim], the last ones theirs.
        Returns the output, and the scores of the keys that leave the window (`enter`).
        """
        first, end = self.length - self._held(), self.length + key.shape[2]
        ring_keys, ring_values = self._in_order()
        keys = torch.cat([self.keys[:, :, : self.anchors], ring_keys, key], 2).flatten(0, 1)
        values = torch.cat([self.values[:, :, : self.anchors], ring_values, value], 2).flatten(0, 1)
        columns = torch.arange(first - self.anchors, end, device=key.device)
        columns[: self.anchors] = -1  # before every query
        until, scores = self._until(keys.unflatten(0, key.shape[:2]), values.unflatten(0, key.shape[:2]), first, end)
        until = until.flatten(0, 1)
        if self.inverse is None and can_run(query):
            return attend_tiles(query, keys, values, columns, until, end - query.shape[2], scaling), scores
        output = torch.empty_like(query)
        for start in range(0, query.shape[2], QUERY_BLOCK):
            block = query[:, :, start : start + QUERY_BLOCK]
            begin = end - query.shape[2] + start
            queries = torch.arange(begin, begin + block.shape[2], device=key.device)[:, None]
            rows, places = ((until > begin) & (columns < begin + block.shape[2])).nonzero(as_tuple=True)
            counts = rows.bincount(minlength=len(until))
            most = int(counts.max())
            # Keys that any query of the block sees, of every head: padded with the first one, which then nobody sees.
            taken = places.new_zeros(len(until), most)
            filled = torch.arange(most, device=key.device) < counts[:, None]
            taken.masked_scatter_(filled, places)
            mask = (columns[taken][:, None] <= queries) & (queries < (until.gather(1, taken) * filled)[:, None])
            heads = torch.arange(len(until), device=key.device)[:, None]
            seen_keys, seen_values = (t[heads, taken].unflatten(0, key.shape[:2]) for t in (keys, values))
            mask = mask.unflatten(0, key.shape[:2])
            if self.inverse is not None:  # the first tokens are the first that are taken
                turned = self._turned(block, begin)
                found = attend_turned(block, turned, self.pattern.sink, seen_keys, seen_values, mask, scaling)
            else:
                found = attend_rows(block, seen_keys, seen_values, mask, scaling)
            output[:, :, start : start + QUERY_BLOCK] = found
        return output, scores

    def _turned(self, query: Tensor, first: int) -> Tensor:
        """The queries of columns from `first` on as they look at the first tokens if positions are counted in the cache."""
        assert self.inverse is not None
        positions = self._positions(torch.arange(first, first + query.shape[2], device=query.device))
        most = self.pattern.sink + (self.pattern.window or 0) - 1
        return turned_back(query, (positions - most).clamp(min=0), self.inverse)

    def _until(self, keys: Tensor, values: Tensor, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """The column from which on each key is seen no more: int64 [batch, heads, anchors, ring and new tokens].

        keys, values: the anchors, then those of the columns from `first` to `end`. Returns as well the scores of those that leave
        the window on the way, [batch, heads, columns from `first` on], if there are any to keep.
        """
        window, sink, anchors = self.window or 0, self.pattern.sink, self.anchors
        columns = torch.arange(first, end, device=keys.device)
        positions = self._positions(columns).expand(*keys.shape[:2], end - first)
        until = torch.where(positions < sink, end, columns + window).where(positions >= 0, 0)
        held = torch.where(self.visible[:, :, :anchors], end, 0)
        leaving, scores = max(0, end - window - first), None  # columns that leave by the last query
        if self.pattern.floating and leaving:
            new = slice(anchors, anchors + leaving)
            scores = self._eligible(key_scores(keys[:, :, new], values[:, :, new], self.weights), first)
            ends = lifetimes(self.scores, scores, self.pattern.floating) + (first + window - 1)
            slots = self.scores.shape[2]
            held[:, :, sink:] = torch.where(self.visible[:, :, sink:anchors], ends[..., :slots], 0)
            until[:, :, :leaving] = torch.where(scores > NONE, ends[..., slots:], until[:, :, :leaving])
        return torch.cat([held, until], -1), scores

    def _attend_recording(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend without letting the tokens in: `crop` decides which of them stay."""
        if self.recent is not None:
            key, value = torch.cat([self.recent[0], key], 2), torch.cat([self.recent[1], value], 2)
        self.recent = key.contiguous(), value.contiguous()
        return self._attend_tokens(query, key, value, scaling)[0]

    # what is held

    def hold(self) -> None:
        """From now on nothing is let go: what is held stays visible, and every later token is kept."""
        if self.window is None and not self.young:
            return
        self.crop(0)
        self.anchors, self.start, self.window, self.young = self.anchors + self._held(), self.length, None, False
        self.scores, self.weights = self.scores[..., :0].clone(), self.weights[:0].clone()  # nothing is chosen any more

    def _outgrown(self, tokens: int) -> bool:
        """Whether with so many more tokens there are more than are kept."""
        return self.pattern.size(self.length + tokens) < self.length + tokens

    def _settle(self) -> None:
        """Give each token its place; from now on keys are let go."""
        self.young, self.window, self.anchors = False, self.pattern.window, self.pattern.sink
        keys, values, self.length = self.keys[:, :, : self.length], self.values[:, :, : self.length], 0
        shape = (*keys.shape[:2], self.anchors, keys.shape[3])
        self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        self.visible = torch.zeros(shape[:3], dtype=torch.bool, device=keys.device)
        self.enter(keys, values)

    def _held(self) -> int:
        """Columns in the ring."""
        return self.length - self.start if self.window is None else min(self.length, self.window)

    def _slots(self, columns: Tensor) -> Tensor:
        return self.anchors + (columns - self.start if self.window is None else columns % max(self.window, 1))

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

    def enter(self, key: Tensor, value: Tensor, scores: Tensor | None = None) -> None:
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
            slot = self.anchors + (self.length - self.start) % window
            self.keys[:, :, slot], self.values[:, :, slot] = key[:, :, 0], value[:, :, 0]
            self.visible[:, :, slot] = True if self.padding is None else (self.length >= self.padding.tokens)[:, None]
        elif len(columns):
            slots: Tensor | slice = self._slots(columns)
            new = slice(tokens - len(columns), tokens)
            if self.window is None:  # one after the other
                slots = slice(self.anchors + self.length - self.start, self.anchors + end - self.start)
            self.keys[:, :, slots], self.values[:, :, slots] = key[:, :, new], value[:, :, new]
            real = True if self.padding is None else columns >= self.padding.tokens[:, None, None]
            self.visible[:, :, slots] = torch.as_tensor(real, device=key.device).expand(*key.shape[:2], len(columns))
        self.length = end

    def _leave(self, key: Tensor, value: Tensor, until: int, scores: Tensor | None) -> None:
        """Columns before `until` leave the window: keep the first tokens, and the best scored others, among them."""
        first, held = self.length - self._held(), self._held()
        sinks = bool(self.pattern.sink) and first < self._ordinary
        if not self.pattern.floating and not sinks:
            return
        if until - first == 1 and held:  # no copy
            slot = self.anchors + first % held  # the ring is full, or `first` is 0
            keys, values = self.keys[:, :, slot : slot + 1], self.values[:, :, slot : slot + 1]
        else:
            columns = torch.arange(first, until, device=key.device)
            slots, new = self._slots(columns[:held]), slice(0, max(until - self.length, 0))
            keys = torch.cat([self.keys[:, :, slots], key[:, :, new]], 2)
            values = torch.cat([self.values[:, :, slots], value[:, :, new]], 2)
        if sinks:
            positions = self._positions(torch.arange(first, until, device=key.device)).expand(keys.shape[:3])
            rows, heads, found = ((positions >= 0) & (positions < self.pattern.sink)).nonzero(as_tuple=True)
            target = positions[rows, heads, found]
            self.keys[rows, heads, target] = keys[rows, heads, found]
            self.values[rows, heads, target] = values[rows, heads, found]
            self.visible[rows, heads, target] = True
        if self.pattern.floating:
            scores = key_scores(keys, values, self.weights) if scores is None else scores[..., : until - first]
            self._choose(keys, values, self._eligible(scores, first))

    def _choose(self, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        """Of the floating keys and those that leave now, [batch, heads, keys, dim], keep those with the highest scores."""
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

    def make_room(self, tokens: int, early: bool = True) -> None:
        """Make room for tokens that are about to enter; not early: only for those before something must go, but at least one."""
        if self.young and not early:
            tokens = max(1, min(tokens, self.pattern.size(FOREVER) - self.length))
        if self.young and self._outgrown(tokens):
            self._settle()
        end = self.length + tokens - self.start
        self._grow(end if self.window is None else min(self.window, end))
        if self.window is not None and self.pattern.floating and end > self.window:
            self._grow_floating(end - self.window)

    @property
    def room(self) -> int:
        """The first column that there is no room for, as many as may come if the buffers need not grow any more."""
        ring, until = self.keys.shape[2] - self.anchors, FOREVER
        if self.window is None:
            return min(self.start + ring, self.pattern.size(FOREVER) if self.young else FOREVER)
        if ring < self.window:
            until = ring
        if self.scores.shape[2] < self.pattern.floating:
            until = min(until, self.window + self.scores.shape[2])
        return until

    def _grow(self, needed: int) -> None:
        """Make the ring at least `needed` slots long, in steps, up to as many as are ever kept in it."""
        slots = self.keys.shape[2] - self.anchors
        if needed <= slots:
            return
        slots = -(-needed // GROWTH) * GROWTH
        if self.young or self.window is not None:
            slots = min(slots, self.pattern.size(FOREVER) if self.window is None else self.window)
        self._insert(self.keys.shape[2], self.anchors + slots - self.keys.shape[2])

    def _grow_floating(self, gone: int) -> None:
        """Make room for the floating keys among the first `gone` columns, in steps, so that a short text holds no empty slots."""
        more = min(-(-gone // GROWTH) * GROWTH, self.pattern.floating) - self.scores.shape[2]
        if more > 0:
            self._insert(self.anchors, more)
            self.anchors += more
            self.scores = F.pad(self.scores, (0, more), value=NONE)

    def _insert(self, place: int, slots: int) -> None:
        """Put empty slots into the buffer."""

        def wider(held: Tensor) -> Tensor:
            empty = held.new_zeros(*held.shape[:2], slots, *held.shape[3:])
            return empty if not held.shape[2] else torch.cat([held[:, :, :place], empty, held[:, :, place:]], 2)

        self.keys, self.values, self.visible = wider(self.keys), wider(self.values), wider(self.visible)

    # what transformers asks of a cache

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` tokens. Those that pushed others out can be taken back only while recording."""
        if self.recent is not None:
            key, value = self.recent
            left = key.shape[2] - tokens
            if left >= 0:
                self.recent = None
                self.enter(key[:, :, :left], value[:, :, :left])
                return
            self.recent, tokens = None, -left
        if tokens == 0:
            return
        if self.window is None and tokens > self.length - self.start:
            raise HeadsinkError(
                f"cannot take back {tokens} tokens: hold() was called {self.length - self.start} tokens ago, and what was "
                "held then stays"
            )
        if self.window is not None and self.length > self.window:
            raise HeadsinkError(
                f"cannot take back {tokens} tokens: a window of {self.window} has let go of older ones; pass a "
                "cache of your own (headsink.new_cache) and call its activate_past_recording() first"
            )
        self.length -= tokens

    def hide(self, hidden: Tensor) -> None:
        """Of the last columns, those that a row is not to see: bool [batch, columns]. Nothing may be let go any more."""
        columns = torch.arange(self.length - hidden.shape[1], self.length, device=hidden.device)
        self.visible[:, :, self._slots(columns)] &= ~hidden[:, None]
        self.holes = True

    def last(self, columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last columns, of a group that lets nothing go: [batch, heads, columns, dim]."""
        end = self.anchors + self.length - self.start
        return self.keys[:, :, end - columns : end], self.values[:, :, end - columns : end]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the batch dimension of all that is held."""
        self.keys, self.values, self.visible = change(self.keys), change(self.values), change(self.visible)
        self.scores = change(self.scores)
        if self.recent is not None:
            self.recent = change(self.recent[0]), change(self.recent[1])
        if self.padding is not None:
            tokens = change(self.padding.tokens)
            most = int(tokens.max())
            self.padding = Padding(tokens, most) if most else None

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.keys, self.values, self.visible, self.scores, self.weights)
        if self.recent is not None:
            yield from self.recent
        if self.padding is not None:
            yield self.padding.tokens
