"""The keys and values of KV heads that share a pattern, and attention over them.

A `HeadGroup` owns one buffer of keys and one of values, [batch, heads, slots, dim], and nothing else of that size:

    | sink tokens | floating sinks |  the last `window` tokens, as a ring: column c in slot c % window  |

A token enters the ring. When it is overwritten it has left the window: it moves to a slot on the left if it is one of
the row's first tokens or a floating sink, otherwise it is gone. The floating sinks are a ring too: the r-th short key that
leaves goes to slot r % floating of theirs, in place of the oldest. A full head is a ring that never wraps. Slots are in
no order; softmax does not mind, because rotary positions are already in the keys.

One token at a time attends to the buffer as it lies, without a copy. Several tokens (prefill, verification) go through
in blocks, each over the buffer, in order, followed by the block, so that a window costs its area and not its square.
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

QUERY_BLOCK = 128  # queries of a windowed head handled at once: 128 was the fastest of 128, 256, 512 on 2 cores
GROWTH = 128  # slots that a ring grows by until it is as long as its window


@dataclass(frozen=True)
class Padding:
    """Left padding of a batch: tokens to skip in each row, int64 [batch], and the largest of them."""

    tokens: Tensor
    most: int


class HeadGroup:
    """Keys and values of the KV heads `heads` of one layer, which share `pattern`.

    thresholds: [heads], the value norm below which a key can be a floating sink. Columns count from the start of the
    batch, positions from the row's first real token; the window is the same in both.
    """

    def __init__(self, pattern: Pattern, heads: list[int], thresholds: Tensor, key: Tensor, padding: Padding | None):
        self.pattern, self.heads = pattern, heads
        self.anchors = pattern.sink + pattern.floating  # slots left of the ring
        self.padding = padding
        shape = (key.shape[0], len(heads), self.anchors, key.shape[3])
        self.keys, self.values = key.new_zeros(shape), key.new_zeros(shape)
        self.visible = torch.zeros(shape[:3], dtype=torch.bool, device=key.device)
        self.floating = torch.zeros(shape[:2], dtype=torch.long, device=key.device)  # short keys that left the window
        self.thresholds = thresholds[heads].to(key.device)[:, None]  # [heads, 1]
        self.length = 0  # columns that have entered the ring
        self.recording = False
        self.recent: tuple[Tensor, Tensor] | None = None  # while recording: tokens that may still be taken back

    # attention

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Let in new tokens and attend from them.

        query: [batch, heads x group, tokens, dim], key and value: [batch, heads, tokens, dim]. Returns
        [batch, heads x group, tokens, dim].
        """
        if self.pattern.full:
            self._enter(key, value)
            return self._attend_full(module, query, scaling)
        if self.recording:
            return self._attend_recording(query, key, value, scaling)
        if query.shape[2] == 1:
            self._enter(key, value)
            return _rows(query, self.keys, self.values, self.visible[:, :, None], scaling)
        output = torch.empty_like(query)
        for start in range(0, query.shape[2], QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            output[:, :, block] = self._attend_block(query[:, :, block], key[:, :, block], value[:, :, block], scaling)
            self._enter(key[:, :, block], value[:, :, block])
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
            return _rows(query, keys, values, None, scaling)
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0].transpose(1, 2)

    def _attend_block(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """A block of queries over what is held and the block itself: [batch, heads x group, block, dim]."""
        first = self.length - self._held()
        ring_keys, ring_values = self._in_order()
        keys = torch.cat([self.keys[:, :, : self.anchors], ring_keys, key], 2)
        values = torch.cat([self.values[:, :, : self.anchors], ring_values, value], 2)
        columns = torch.arange(first, self.length + key.shape[2], device=key.device)
        queries = columns[-query.shape[2] :, None]
        window = self.pattern.window or 0
        positions = self._positions(columns)
        row = positions[..., None, :]
        mask = (columns <= queries) & (row >= 0) & ((row < self.pattern.sink) | (queries - columns < window))
        mask = mask.expand(*keys.shape[:2], *mask.shape[-2:])  # [batch, heads, block, keys]
        held = self.visible[:, :, None, : self.anchors].expand(*mask.shape[:3], self.anchors)
        if self.pattern.floating:
            short = self._short(values[:, :, self.anchors :], positions)
            rank = self._ranks(short)
            gone = (queries[:, 0] - window + 1 - first).clamp(min=0)  # columns that have left the window at each query
            most = rank[..., gone, None]  # short keys among them and before: [batch, heads, block, 1]
            least = most - self.pattern.floating
            rank = rank[:, :, None, :-1]
            mask = mask | (short[:, :, None] & (rank >= least) & (rank < most))
            last = self.floating[..., None] - 1
            rank = last - (last - torch.arange(self.pattern.floating, device=key.device)) % self.pattern.floating
            sink = held[..., : self.pattern.sink]
            held = torch.cat([sink, held[..., self.pattern.sink :] & (rank[:, :, None] >= least)], -1)
        return _rows(query, keys, values, torch.cat([held, mask], -1), scaling)

    def _attend_recording(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend without letting the tokens in: `crop` decides which of them stay."""
        past = 0
        if self.recent is not None:
            past = self.recent[0].shape[2]
            key, value = torch.cat([self.recent[0], key], 2), torch.cat([self.recent[1], value], 2)
        self.recent = key.contiguous(), value.contiguous()
        output = torch.empty_like(query)
        for start in range(0, query.shape[2], QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, query.shape[2])
            until = slice(0, past + end)
            output[:, :, start:end] = self._attend_block(
                query[:, :, start:end], key[:, :, until], value[:, :, until], scaling
            )
        return output

    # what is held

    def _held(self) -> int:
        """Columns in the ring."""
        return self.length if self.pattern.window is None else min(self.length, self.pattern.window)

    def _slots(self, columns: Tensor) -> Tensor:
        return self.anchors + (columns if self.pattern.window is None else columns % max(self.pattern.window, 1))

    def _in_order(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the ring, oldest first."""
        columns = torch.arange(self.length - self._held(), self.length, device=self.keys.device)
        slots = self._slots(columns)
        return self.keys[:, :, slots], self.values[:, :, slots]

    def _positions(self, columns: Tensor) -> Tensor:
        """Positions in the row's text: [keys], or [batch, 1, keys] with padding, where they are negative."""
        return columns if self.padding is None else columns - self.padding.tokens[:, None, None]

    def _short(self, values: Tensor, positions: Tensor) -> Tensor:
        """Which keys become floating sinks when they leave the window: bool [batch, heads, keys]."""
        return (values.float().norm(dim=-1) < self.thresholds) & (positions >= self.pattern.sink)

    def _ranks(self, short: Tensor) -> Tensor:
        """Short keys before each, those that have left among them: [batch, heads, keys + 1], the last counts them all.

        short: [batch, heads, keys], in order, beginning with the oldest key that is still in the ring.
        """
        before = self.floating[..., None]
        return torch.cat([before, before + short.cumsum(-1)], -1)

    def _enter(self, key: Tensor, value: Tensor) -> None:
        """Take tokens into the ring; those that they push out of the window move left or are dropped."""
        tokens, end = key.shape[2], self.length + key.shape[2]
        window = end if self.pattern.window is None else self.pattern.window
        self._grow(min(window, end))
        if end > window:
            self._leave(key, value, end - window)
        columns = torch.arange(max(self.length, end - window), end, device=key.device)
        if tokens == 1 and window:  # a slice is sooner written than an index
            slot = self.anchors + self.length % window
            self.keys[:, :, slot], self.values[:, :, slot] = key[:, :, 0], value[:, :, 0]
            self.visible[:, :, slot] = True if self.padding is None else (self.length >= self.padding.tokens)[:, None]
        elif len(columns):
            slots, new = self._slots(columns), slice(tokens - len(columns), tokens)
            self.keys[:, :, slots], self.values[:, :, slots] = key[:, :, new], value[:, :, new]
            real = True if self.padding is None else columns >= self.padding.tokens[:, None, None]
            self.visible[:, :, slots] = torch.as_tensor(real, device=key.device).expand(*key.shape[:2], len(columns))
        self.length = end

    def _leave(self, key: Tensor, value: Tensor, until: int) -> None:
        """Columns before `until` leave the window: keep the first tokens and the last floating sinks among them."""
        first, held = self.length - self._held(), self._held()
        most = 0 if self.padding is None else self.padding.most
        if not self.anchors or (not self.pattern.floating and first >= self.pattern.sink + most):
            return
        columns = torch.arange(first, until, device=key.device)
        slots = self._slots(columns[:held])
        new = slice(0, max(until - self.length, 0))
        values = torch.cat([self.values[:, :, slots], value[:, :, new]], 2)
        target = positions = self._positions(columns)
        lasting = (positions >= 0) & (positions < self.pattern.sink)
        if self.pattern.floating:
            short = self._short(values, positions)
            lasting = lasting | short
        if not lasting.any():  # most tokens, when they leave one at a time
            return
        if self.pattern.floating:
            rank = self._ranks(short)
            self.floating, rank = rank[..., -1].clone(), rank[..., :-1]
            # Of many that leave at once only the last have a slot, so that no two are written to the same one.
            lasting = lasting & ~(short & (rank < self.floating[..., None] - self.pattern.floating))
            target = torch.where(short, self.pattern.sink + rank % self.pattern.floating, positions)
        keys = torch.cat([self.keys[:, :, slots], key[:, :, new]], 2)
        rows, heads, found = lasting.expand(keys.shape[:3]).nonzero(as_tuple=True)
        target = target.expand(keys.shape[:3])[rows, heads, found]
        self.keys[rows, heads, target] = keys[rows, heads, found]
        self.values[rows, heads, target] = values[rows, heads, found]
        self.visible[rows, heads, target] = True

    def _grow(self, needed: int) -> None:
        """Make the ring at least `needed` slots long, in steps, up to the window."""
        slots = self.keys.shape[2] - self.anchors
        if needed <= slots:
            return
        slots = -(-needed // GROWTH) * GROWTH
        if self.pattern.window is not None:
            slots = min(slots, self.pattern.window)
        more = self.anchors + slots - self.keys.shape[2]
        self.keys = torch.cat([self.keys, self.keys.new_zeros(*self.keys.shape[:2], more, self.keys.shape[3])], 2)
        self.values = torch.cat(
            [self.values, self.values.new_zeros(*self.values.shape[:2], more, self.values.shape[3])], 2
        )
        self.visible = F.pad(self.visible, (0, more))

    # what transformers asks of a cache

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` tokens. Those that pushed others out can be taken back only while recording."""
        if self.recent is not None:
            key, value = self.recent
            left = key.shape[2] - tokens
            if left >= 0:
                self.recent = None
                self._enter(key[:, :, :left], value[:, :, :left])
                return
            self.recent, tokens = None, -left
        if tokens == 0:
            return
        if self.pattern.window is not None and self.length > self.pattern.window:
            raise HeadsinkError(
                f"cannot take back {tokens} tokens: a window of {self.pattern.window} has let go of older ones; pass a "
                "cache of your own (headsink.new_cache) and call its activate_past_recording() first"
            )
        self.length -= tokens
        self.visible[:, :, self.anchors + self.length :] = False

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the batch dimension of all that is held."""
        self.keys, self.values, self.visible = change(self.keys), change(self.values), change(self.visible)
        self.floating = change(self.floating)
        if self.recent is not None:
            self.recent = change(self.recent[0]), change(self.recent[1])
        if self.padding is not None:
            tokens = change(self.padding.tokens)
            most = int(tokens.max())
            self.padding = Padding(tokens, most) if most else None

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.keys, self.values, self.visible, self.floating, self.thresholds)
        if self.recent is not None:
            yield from self.recent
        if self.padding is not None:
            yield self.padding.tokens


def _rows(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention with the queries of a group as rows of their KV head, so that each key is read once.

    query: [batch, heads x group, tokens, dim]; keys, values: [batch, heads, keys, dim]; mask: bool [batch, heads, tokens,
    keys] or None. Zero where a query sees no key.
    """
    batch, heads, n_keys, dim = keys.shape
    if n_keys == 0:
        return torch.zeros_like(query)
    tokens, group = query.shape[2], query.shape[1] // heads
    rows = query.reshape(batch, heads, group * tokens, dim)
    if mask is not None:
        mask = (
            mask[:, :, None].expand(batch, heads, group, tokens, n_keys).reshape(batch, heads, group * tokens, n_keys)
        )
    output = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    return output.view(batch, heads * group, tokens, dim)
