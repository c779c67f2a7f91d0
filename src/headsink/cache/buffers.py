"""Buffers of cached keys and values of the heads with one pattern, and where in them each column of the text lies.

One buffer of keys and one of values, [batch, heads, slots, dim]:

    | sink tokens | top-k keys |  the last `window` tokens, as a ring: column c in slot (c - start) % window  |

The ring of a full head never wraps, nor does any ring after `freeze`, when it starts after all cached keys. While a text is no
longer than what a head keeps (`below_capacity`), the ring does not wrap either. The order of the slots does not matter, because
the keys are already rotated. cache/slots.py says which keys are evicted.

With another `kv_dtype` than the model's, buffers have rows of attention/formats.py, and those of keys and values may differ in
width. Keys are rounded when they enter the cache, and moved as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headsink.attention.formats import decode, encode
from headsink.attention.params import Padding
from headsink.cache.inference_mode import outside_inference_mode
from headsink.cache.options import LayerOptions
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import FOREVER, Pattern
from headsink.eviction.scorers import NONE
from headsink.utils import device

GROWTH = 128  # slots by which a ring grows until it is as long as its window


class Buffers:
    """Keys and values of the KV heads `heads` of one layer, all with `pattern`, which they keep at the end of a segment.

    key: new keys of the layer, [batch, KV heads, tokens, dim], whose batch, dim, dtype and device the buffers get. `self.pattern`
    has the window of decoding. Columns count from the start of the batch, positions from a row's first real token.
    """

    @outside_inference_mode
    def __init__(
        self,
        pattern: Pattern,
        heads: list[int],
        options: LayerOptions,
        key: Tensor,
        padding: Padding | None,
    ):
        self.kv_dtype, self.dtype, self.head_dim = options.kv_dtype, key.dtype, key.shape[3]
        self.segment_pattern, self.pattern = pattern, pattern.widen(options.decode_window)
        self.heads, self.exact, self.scorer = heads, options.exact, options.scorer
        self.rotary = options.rotary if pattern.sink else None
        self.below_capacity = not pattern.full and self.rotary is None
        self.window = None if self.below_capacity else pattern.window  # None: nothing is evicted
        # slots before the ring; grows by those of top-k keys
        self.prefix_slots = 0 if self.below_capacity else pattern.sink
        self.start = 0  # column in the first slot of the ring, before it wraps
        self.padding = padding
        shape = (key.shape[0], len(heads), self.prefix_slots, key.shape[3])
        self.keys, self.values = self._encode(key.new_zeros(shape), key.new_zeros(shape))
        self.visible = torch.zeros(shape[:3], dtype=torch.bool, device=key.device)
        kind = torch.promote_types(key.dtype, torch.float32)
        self.scores = torch.full((*shape[:2], 0), NONE, dtype=kind, device=key.device)
        self.index = device.index(heads, key.device)
        weights = device.on_card(options.weights, key.device)
        self.weights = weights[self.index] if pattern.top_k else weights[:0]
        self.length = 0  # columns appended so far
        self.recording = False
        self.holes = False  # whether columns were hidden from a row (`hide`)
        self.recent: tuple[Tensor, Tensor] | None = None  # while recording: keys and values that `crop` may remove
        self.recent_scores: Tensor | None = None  # importance scores of a prompt among them
        self.recent_segment = False  # whether they are a segment

    @property
    def quantized(self) -> bool:
        """Whether keys and values are rounded when they enter the cache."""
        return self.kv_dtype != "auto"

    def _encode(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, [..., dim], as the buffers hold them. Those that are in this form stay as they are."""
        return encode(self.kv_dtype, key, value)

    def _decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of the buffers, [..., slots, columns], as numbers of the model's dtype: [..., slots, dim]."""
        return decode(self.kv_dtype, keys, values, self.dtype)

    def rounded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as they will be when they are cached."""
        return self._decode(*self._encode(key, value))

    @property
    def evicts(self) -> bool:
        """Whether keys are evicted, now or later."""
        return self.below_capacity or self.window is not None

    @property
    def columns(self) -> int:
        """The number of columns appended so far, with those that `crop` may remove."""
        return self.length + (0 if self.recent is None else self.recent[0].shape[2])

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
        """Return the rows of the keys and values of the ring, oldest first."""
        columns = torch.arange(self.length - self._held(), self.length, device=self.keys.device)
        slots = self._slots(columns)
        return self.keys[:, :, slots], self.values[:, :, slots]

    def _positions(self, columns: Tensor) -> Tensor:
        """Return positions from the first real token: [keys], or [batch, 1, keys] with padding, where they are negative."""
        return columns if self.padding is None else columns - self.padding.tokens[:, None, None]

    def last(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the last columns of a group that does not evict: [batch, heads, columns, dim]."""
        end = self.prefix_slots + self.length - self.start
        return self._decode(self.keys[:, :, end - columns : end], self.values[:, :, end - columns : end])

    def overwrites(self, columns: Tensor) -> Overwritten | None:
        """Return what the ring holds where it will hold the next columns, None if it has not wrapped by then."""
        columns = columns if self.window is None else columns[columns - self.start >= self.window]
        if self.window is None or not len(columns):
            return None
        slots = self._slots(columns)
        return Overwritten(
            self, columns, slots, self.keys[:, :, slots], self.values[:, :, slots], self.visible[:, :, slots]
        )

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


class Overwritten(NamedTuple):
    """What a ring held in some slots before other columns were written there: keys and values, [batch, heads, columns, dim]."""

    buffers: Buffers
    columns: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor

    def restore(self, length: int) -> None:
        """Put it back where the columns from `length` on were written."""
        back, own = self.columns >= length, self.buffers
        for buffer, old in ((own.keys, self.keys), (own.values, self.values), (own.visible, self.visible)):
            buffer[:, :, self.slots[back]] = old[:, :, back]
