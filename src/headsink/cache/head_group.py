"""KV heads of a layer that share a pattern: what they hold (slots.py), and attention over it.

One token at a time attends to the buffer as it lies, without a copy. Of several tokens (prefill, verification) it is
settled first from which query on each key is seen no more; then they go through in blocks, each over the keys that its queries
see, so that a window costs its area and not its square.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headsink.attention import backends
from headsink.attention.eager import attend_rows
from headsink.attention.params import QUERY_BLOCK, AttentionParams
from headsink.attention.visibility import KeyVisibility
from headsink.cache.slots import Slots
from headsink.eviction.lifetimes import lifetimes
from headsink.eviction.pattern import FOREVER
from headsink.eviction.scoring import NONE, key_scores
from headsink.models.rope import rotate_back


class HeadGroup(Slots):
    """The KV heads of one layer that share a pattern."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, softmax: AttentionParams) -> Tensor:
        """Let in new tokens and attend from them.

        query: [batch, heads x group, tokens, dim], key and value: [batch, heads, tokens, dim]; softmax: that of these heads.
        Returns [batch, heads x group, tokens, dim].
        """
        if self.below_capacity and self.outgrown(query.shape[2]):
            self._start_evicting()
        backend = self._backend(query, softmax)
        whole = softmax.plain and (self.pattern.full or self.below_capacity)
        if (
            whole
            and not self.holes
            and not (backend and (self.below_capacity or not self.exact) and self._beats_sdpa(backend, query))
        ):
            self.append_keys(key, value)
            return self._attend_full(module, query, softmax)
        if self.recording and self.window is not None:
            return self._attend_recording(query, key, value, softmax)
        if query.shape[2] == 1 or (backend and self.window is None):
            self.append_keys(key, value)
            return self._attend_buffer(query, softmax)
        output, start = torch.empty_like(query), 0
        first = not self.length and self.padding is None
        if first and self.window is not None and backend is None and softmax.plain:
            # The first queries of a text see all that is before them.
            start = self.pattern.size(query.shape[2])
            new = query[:, :, :start], key[:, :, :start], value[:, :, :start]
            if start:
                output[:, :, :start] = sdpa_attention_forward(module, *new, None, scaling=softmax.scaling)[0].transpose(
                    1, 2
                )
                self.append_keys(*new[1:])
        if self.window is not None:
            if start < query.shape[2]:
                rest = query[:, :, start:], key[:, :, start:], value[:, :, start:]
                output[:, :, start:], scores = self._attend_tokens(*rest, softmax)
                self.append_keys(*rest[1:], scores)
            return output
        for start in range(0, query.shape[2], QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            self.append_keys(key[:, :, block], value[:, :, block])
            output[:, :, block] = self._attend_buffer(query[:, :, block], softmax)
        return output

    def _backend(self, query: Tensor, softmax: AttentionParams) -> backends.Backend | None:
        """The kernels that can attend; none can rotate queries back for cache-relative positions."""
        return None if self.inverse is not None else backends.backend_for(query, softmax)

    def _beats_sdpa(self, backend: backends.Backend, query: Tensor) -> bool:
        return self.padding is not None or backend.beats_sdpa(query, len(self.heads))

    def _attend_full(self, module: nn.Module, query: Tensor, softmax: AttentionParams) -> Tensor:
        """Full attention by the very call that transformers makes, so that an all-full plan is the model itself; unless that is
        not asked for and there is a sooner one."""
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
            # The same bits as the call below, 5 times sooner at 7,500 keys (bfloat16, 2 cores); in float32 it is slower.
            return attend_rows(query, keys, values, None, softmax)
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=softmax.scaling)[0].transpose(1, 2)

    def _attend_buffer(self, query: Tensor, softmax: AttentionParams) -> Tensor:
        """The last token over the buffer as it lies, or the last tokens if nothing is let go."""
        end = self.prefix_slots + self._held()
        if backend := self._backend(query, softmax):
            if backend.is_decode_shape(query, len(self.heads)):
                return backend.decode(query, self.keys, self.values, self.visible, end, softmax)
            until = torch.where(self.visible, FOREVER, 0).flatten(0, 1)
            sight = self._sight(until, self.length - query.shape[2], self.start)
            return backend.prefill(query, self.keys.flatten(0, 1), self.values.flatten(0, 1), sight, softmax)
        mask = self.visible[:, :, None, :end]
        if query.shape[2] > 1:
            slots = torch.arange(end, device=query.device)
            mask = mask & (slots <= slots[end - query.shape[2] :, None])
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        rotated = self._turned(query, self.length - query.shape[2])
        return attend_rows(query, keys, values, mask, softmax, rotated, self.pattern.sink)

    def _attend_tokens(
        self, query: Tensor, key: Tensor, value: Tensor, softmax: AttentionParams
    ) -> tuple[Tensor, Tensor | None]:
        """Several tokens of a windowed head over what is held and themselves, in blocks. Nothing enters.

        query: [batch, heads x group, tokens, dim]; key, value: [batch, heads, these tokens or more, dim], the last ones theirs.
        Returns the output, and the scores of the keys that leave the window (`append_keys`).
        """
        first, end = self.length - self._held(), self.length + key.shape[2]
        ring_keys, ring_values = self._in_order()
        keys = torch.cat([self.keys[:, :, : self.prefix_slots], ring_keys, key], 2).flatten(0, 1)
        values = torch.cat([self.values[:, :, : self.prefix_slots], ring_values, value], 2).flatten(0, 1)
        until, scores = self._until(keys.unflatten(0, key.shape[:2]), values.unflatten(0, key.shape[:2]), first, end)
        until = until.flatten(0, 1)
        if backend := self._backend(query, softmax):
            sight = self._sight(until, end - query.shape[2], first)
            return backend.prefill(query, keys, values, sight, softmax), scores
        columns = torch.arange(first - self.prefix_slots, end, device=key.device)
        columns[: self.prefix_slots] = -1  # before every query
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
            mask, rotated = mask.unflatten(0, key.shape[:2]), self._turned(block, begin)
            # The first tokens are the first that are taken.
            found = attend_rows(block, seen_keys, seen_values, mask, softmax, rotated, self.pattern.sink)
            output[:, :, start : start + QUERY_BLOCK] = found
        return output, scores

    def _sight(self, until: Tensor, first: int, start: int) -> KeyVisibility:
        """What queries from column `first` on see of the anchors and of what follows them, from column `start` on."""
        gaps, held = self.padding is not None or self.holes, self.window is None
        reach = self.prefix_slots if held else until.shape[1]
        if not held and not self.pattern.top_k:
            reach = min(reach, self.prefix_slots + max(0, self._ordinary - start))
        far = self.prefix_slots if held else self.pattern.sink + self.pattern.top_k
        return KeyVisibility(until, first, self.prefix_slots, start, self.window, gaps, far, reach)

    def _turned(self, query: Tensor, first: int) -> Tensor | None:
        """The queries of columns from `first` on as they look at the first tokens if positions are counted in the cache."""
        if self.inverse is None:
            return None
        positions = self._positions(torch.arange(first, first + query.shape[2], device=query.device))
        most = self.pattern.sink + (self.pattern.window or 0) - 1
        return rotate_back(query, (positions - most).clamp(min=0), self.inverse)

    def _until(self, keys: Tensor, values: Tensor, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """The column from which on each key is seen no more: int64 [batch, heads, anchors, ring and new tokens].

        keys, values: the anchors, then those of the columns from `first` to `end`. Returns as well the scores of those that leave
        the window on the way, [batch, heads, columns from `first` on], if there are any to keep.
        """
        window, sink, prefix_slots = self.window or 0, self.pattern.sink, self.prefix_slots
        columns = torch.arange(first, end, device=keys.device)
        positions = self._positions(columns).expand(*keys.shape[:2], end - first)
        until = torch.where(positions < sink, end, columns + window).where(positions >= 0, 0)
        seen = self._seen(first, end) if self.holes else None
        until = until if seen is None else until.where(seen, 0)
        held = torch.where(self.visible[:, :, :prefix_slots], end, 0)
        leaving, scores = max(0, end - window - first), None  # columns that leave by the last query
        if self.pattern.top_k and leaving:
            new = slice(prefix_slots, prefix_slots + leaving)
            scores = self._eligible(key_scores(keys[:, :, new], values[:, :, new], self.weights), first)
            scores = scores if seen is None else scores.masked_fill(~seen[:, :, :leaving], NONE)
            ends = lifetimes(self.scores, scores, self.pattern.top_k) + (first + window - 1)
            slots = self.scores.shape[2]
            held[:, :, sink:] = torch.where(self.visible[:, :, sink:prefix_slots], ends[..., :slots], 0)
            until[:, :, :leaving] = torch.where(scores > NONE, ends[..., slots:], until[:, :, :leaving])
        return torch.cat([held, until], -1), scores

    def _attend_recording(self, query: Tensor, key: Tensor, value: Tensor, softmax: AttentionParams) -> Tensor:
        """Attend without letting the tokens in: `crop` decides which of them stay."""
        if self.recent is not None:
            key, value = torch.cat([self.recent[0], key], 2), torch.cat([self.recent[1], value], 2)
        self.recent = key.contiguous(), value.contiguous()
        return self._attend_tokens(query, key, value, softmax)[0]
