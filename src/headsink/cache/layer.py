"""PlanLayer, a transformers cache layer that stores only the keys and values that a plan keeps.

The KV heads with the same pattern form a `HeadGroup` (cache/head_group.py), which stores their keys and attends to them.
`Cache.update` returns an `Update` instead of two tensors. The attention function (attention/interface.py) passes it to
`PlanLayer.attend`, which returns the output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from headsink.attention import backends
from headsink.attention.cuda.table import DeviceTable
from headsink.attention.formats import KVDtype
from headsink.attention.interface import PlanLength, Update, cast
from headsink.attention.params import AttentionParams, Padding
from headsink.attention.passes import check_pass
from headsink.cache.head_group import HeadGroup, View
from headsink.cache.options import LayerOptions
from headsink.cache.padding import continue_padding
from headsink.cache.segments import DENSE, DensePrefill, PrefillOptions
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import FULL, Pattern
from headsink.eviction.scorers import LINEAR
from headsink.eviction.scorers.prompt import match_scale
from headsink.models.transformers_names import drafted
from headsink.utils import device


class PlanLayer(CacheLayerMixin):
    """One layer of a plan's cache: its KV heads, grouped by pattern.

    patterns: of every KV head. prefill: how calls of several tokens are read. sliding: the window in tokens of a layer that has
    one in the model; no plan changes such a layer. shared: later layers of the model attend to its keys.
    """

    is_compileable, is_croppable = False, True

    def __init__(
        self,
        patterns: list[Pattern],
        options: LayerOptions,
        prefill: PrefillOptions = DENSE,
        sliding: int | None = None,
        shared: bool = False,
    ):
        super().__init__()
        self.patterns, self.options, self.prefill = patterns, options, prefill
        self.sliding, self.shared = sliding, shared
        self.attended = 0  # calls of `attend`; attention/passes.py checks that the plan was applied
        self.groups: list[HeadGroup] = []
        self.seen = 0
        self.layout: Any = None  # KVTable of the groups; None after their buffers may have moved
        self.on_card: DeviceTable | None = None  # during a decode step on a GPU (decoding/cuda.py)
        self.recording = self.frozen = False

    @classmethod
    def of_window(
        cls, window: int, kv_heads: int, head_dim: int, exact: bool, shared: bool, kv_dtype: KVDtype = "auto"
    ) -> PlanLayer:
        """A layer with a sliding window of the model."""
        weights = torch.zeros(1, LINEAR.n_features(head_dim)).expand(kv_heads, -1)  # of no top-k keys
        options = LayerOptions(weights, exact=exact, kv_dtype=kv_dtype)
        return cls([Pattern(window=window)] * kv_heads, options, PrefillOptions(dense=False), window, shared)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanLayer:
        """Copy the layer without the tables of addresses."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        left_out = {"layout": None, "on_card": None}  # they contain addresses of the original's buffers
        copied.__dict__ |= {
            name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name not in left_out
        }
        copied.__dict__ |= left_out
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"layout": None, "on_card": None}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Update, Update]:  # type: ignore[override]
        """Return an `Update` of [batch, KV heads, tokens, dim] keys and values, which `attend` will append to the cache."""
        check_pass(self)
        key_states, value_states = cast(key_states), cast(value_states)
        self._check(key_states, value_states)
        update = Update(self, key_states, value_states)
        return update, update

    def _check(self, key: Tensor, value: Tensor) -> None:
        """Raise unless new keys and values match the cache. Kernels use addresses and do not check shapes."""
        found = {"keys": list(key.shape), "dtype": key.dtype, "device": key.device}
        fits = {
            "keys": [key.shape[0], len(self.patterns), key.shape[2], key.shape[3]],
            "dtype": value.dtype,
            "device": value.device,
        }
        if self.groups:
            first = self.groups[0]
            fits = {
                "keys": [len(first.keys), len(self.patterns), key.shape[2], first.head_dim],
                "dtype": first.dtype,
                "device": first.keys.device,
            }
        features = self.options.weights.shape[-1]
        if self.options.scorer.n_features(key.shape[3]) != features or key.shape != value.shape:
            raise HeadsinkError(
                f"this cache is for another model: it got keys {list(key.shape)} and values {list(value.shape)}, "
                f"[batch, KV heads, tokens, head size], and has {features} scorer weights for {len(self.patterns)} KV heads"
            )
        for what, expected in fits.items():
            if found[what] != expected:
                raise HeadsinkError(
                    f"this cache does not fit the model: {what} are {found[what]} and must be {expected}; start with a new cache"
                )

    def attend(
        self, module: nn.Module, query: Tensor, update: Update, padding: Padding | None, softmax: AttentionParams
    ) -> Tensor:
        """Append the tokens of `update`, and return the attention of all heads: [batch, tokens, query heads, dim].

        Layers that attend to the same keys call it once more each, with the same update.
        """
        if update.views:
            return self._attend_again(module, query, update, softmax)
        plain = padding is None or padding.hidden is None
        drafts = (
            drafted() if self.prefill.dense and self.recording and not self.seen and plain and not self.shared else 0
        )
        if drafts:
            return self._attend_drafts(module, query, update, padding, softmax, drafts)
        self.attended += 1
        if not self.groups:
            self._make_groups(update.key, padding)
        elif continue_padding(self.groups, self.seen, padding):
            self.layout = None
        key, value = update.key, update.value
        cached = self.groups[0].keys
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad or cached.requires_grad):
            if (kind := self.options.kv_dtype) != "auto":
                raise HeadsinkError(
                    f"kv_dtype: {kind!r} has no gradients; leave it out to train, or use torch.no_grad()"
                )
            # The query decides whether kernels run, which have no gradients. An adapter may be on keys or values only.
            query = query if query.requires_grad else query.detach().requires_grad_()
        if self.on_card is not None:
            rotary = self.options.rotary
            rotated = None if rotary is None else self.on_card.rotated(query, rotary)
            return self.on_card.attend(query, key, value, softmax, rotated).transpose(1, 2)
        self.is_initialized = True
        self.seen += key.shape[2]
        if self._reads_densely(key.shape[2]):
            self.layout = None
            views = update.views if self.shared else None
            dense = DensePrefill(self.groups, self.options.weights, self.prefill, module, softmax, views)
            return dense.attend(query, key, value).transpose(1, 2)
        backend = backends.backend_for(query, softmax)
        if backend and not self.shared and self._steps(backend, query, softmax):
            return self._step(backend, query, key, value, softmax).transpose(1, 2)
        self.layout = None
        parallel = self._at_once(query) if backend and backend.reads_layers and not self.shared else []
        if len(self.groups) == 1 and not parallel and not self.shared:
            return self.groups[0].append(key, value)(module, query, softmax).transpose(1, 2)
        batch, kv_heads, tokens, _ = key.shape
        grouped = query.view(batch, kv_heads, -1, tokens, query.shape[3])
        output = torch.empty_like(grouped)
        if parallel:
            from headsink.cache.prefill_cuda import read

            read(parallel, grouped, key, value, softmax, output)
        for group in self.groups:
            if group in parallel:
                continue
            part, own = grouped[:, group.index].flatten(1, 2), softmax.of(group.heads, kv_heads)
            attend = group.append(key[:, group.index], value[:, group.index])
            part = attend(module, part, own)
            if self.shared:
                update.views.append(View(slice(0, tokens), group, attend))
            output[:, group.index] = part.view(batch, len(group.heads), -1, tokens, query.shape[3])
        return output.flatten(1, 2).transpose(1, 2)

    def _attend_again(self, module: nn.Module, query: Tensor, update: Update, softmax: AttentionParams) -> Tensor:
        """Attend from another layer of the model, to the keys that this layer attended to.

        The queries may be those of the last tokens only.
        """
        kv_heads, left_out = len(self.patterns), update.key.shape[2] - query.shape[2]
        grouped = query.unflatten(1, (kv_heads, -1))
        output = torch.empty_like(grouped)
        for tokens, group, attend in update.views:
            if tokens.stop > left_out:
                own = slice(max(0, tokens.start - left_out), tokens.stop - left_out)
                part = grouped[:, group.index, :, own]
                found = attend(module, part.flatten(1, 2), softmax.of(group.heads, kv_heads))
                output[:, group.index, :, own] = found.view_as(part)
        return output.flatten(1, 2).transpose(1, 2)

    def _attend_drafts(
        self,
        module: nn.Module,
        query: Tensor,
        update: Update,
        padding: Padding | None,
        softmax: AttentionParams,
        drafts: int,
    ) -> Tensor:
        """Attend from a prompt, which is not cropped, and from drafts after it, as if they came in two calls."""
        sizes = [query.shape[2] - drafts, drafts]
        parts = zip(*(t.split(sizes, 2) for t in (query, update.key, update.value)), strict=True)
        output, self.record_past = [], False
        for own_query, key, value in parts:
            output.append(self.attend(module, own_query, Update(self, key, value), padding, softmax))
            self.record_past = True
        self.attended -= 1  # one call of the model
        return torch.cat(output, 1)

    def _reads_densely(self, tokens: int) -> bool:
        """Whether new tokens are a segment. Tokens that may be cropped, as in assisted decoding, are read one by one."""
        cropped = self.recording and self.groups[0].columns > 0
        return (
            self.prefill.dense
            and tokens > 1
            and not cropped
            and any(group.evicts or group.quantized for group in self.groups)
        )

    def _steps(self, backend: backends.Backend, query: Tensor, softmax: AttentionParams) -> bool:
        """Whether the decode kernel can run: one token, all heads in one call."""
        groups, padding = self.groups, self.groups[0].padding
        return (
            query.shape[2] == 1
            and (padding is None or padding.most <= groups[0].length or backend.decodes_padding)
            # not where the output must equal the full cache's bit for bit
            and not (
                softmax.plain
                and len(groups) == 1
                and groups[0].pattern.full
                and groups[0].exact
                and not groups[0].quantized
            )
            and not any(g.recording or g.rotary is not None for g in groups)
            and (groups[0].scorer.name in backend.scorers or not any(g.pattern.top_k for g in groups))
        )

    def _at_once(self, query: Tensor) -> list[HeadGroup]:
        """Return the groups that cache/prefill_cuda.py fills: empty ones whose pattern keeps less than the whole text."""
        tokens, first = query.shape[2], self.seen == query.shape[2]
        if not first or tokens == 1 or self.recording or self.groups[0].padding is not None:
            return []
        return [
            group
            for group in self.groups
            if group.rotary is None and group.below_capacity and group.exceeds_capacity(tokens)
        ]

    def _step(
        self, backend: backends.Backend, query: Tensor, key: Tensor, value: Tensor, softmax: AttentionParams
    ) -> Tensor:
        from headsink.cache.kv_table import KVTable

        length = self.groups[0].length
        if self.layout is None or length >= self.layout.until:
            self.layout = KVTable(self.groups, 1)
        for group in self.groups:
            group.length += 1
        return backend.step(self.layout, length, query, key, value, softmax)

    def _make_groups(self, key: Tensor, padding: Padding | None) -> None:
        by_pattern: dict[Pattern, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            by_pattern.setdefault(FULL if self.frozen else pattern, []).append(head)
        self.layout = None
        weights = device.on_card(self.options.weights, key.device)  # once for all groups
        self.options = replace(self.options, weights=weights)
        own = replace(self.options, exact=self.options.exact and len(by_pattern) == 1)
        self.groups = [HeadGroup(pattern, heads, own, key, padding) for pattern, heads in by_pattern.items()]
        for group in self.groups:
            group.recording = self.recording

    @torch.compiler.disable  # a number that torch.compile makes a symbol has no type
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return PlanLength(self.seen + query_length), 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.groups[0].keys.shape[0] if self.groups else -1

    @property
    def record_past(self) -> bool:
        """Whether tokens can be cropped after they pushed others out of the window. transformers' name for `recording`."""
        return self.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.recording, self.layout = value, None
        for group in self.groups:
            group.recording = value
            if not value:
                group.crop(0)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def fill(self, key: Tensor, value: Tensor, padding: Padding | None, scores: Tensor | None = None) -> None:
        """Fill the empty layer with a whole text, [batch, KV heads, tokens, dim], without computing attention.

        scores: [batch, KV heads, tokens], importance scores that replace those of the plan's scorer; they are mapped to its
        scale.
        """
        self._make_groups(key, padding)
        if scores is not None:
            linear, scores = self.options.scorer.scores(key, value, self.options.weights), scores.clone()
            for row, first in enumerate([0] * len(key) if padding is None else padding.tokens.tolist()):
                scores[row, :, first:] = match_scale(scores[row, :, first:], linear[row, :, first:])
        for group in self.groups:
            own = key[:, group.heads], value[:, group.heads]
            if group.must_evict(key.shape[2]):
                group.end_segment(*own, None if scores is None else scores[:, group.heads])
            else:
                group.append_keys(*own)
        self.seen, self.is_initialized = key.shape[2], True

    def fill_window(self, key: Tensor, value: Tensor, seen: int, padding: Padding | None) -> None:
        """Fill an empty layer with the last of `seen` tokens, at most its window: [batch, KV heads, tokens, dim]."""
        self._make_groups(key, padding)
        for group in self.groups if seen > key.shape[2] else ():
            group.begin(seen - key.shape[2])
        self.append(key, value)
        self.seen = seen

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append tokens, [batch, KV heads, tokens, dim], without computing attention."""
        if not self.groups:
            self._make_groups(key, None)
        self.layout = None
        for group in self.groups:
            group.append_keys(key[:, group.heads], value[:, group.heads])
        self.seen, self.is_initialized = self.seen + key.shape[2], True

    def freeze(self) -> None:
        """Stop evicting, but for a sliding window of the model. An empty layer will never evict."""
        if self.sliding is not None:
            return
        self.frozen, self.layout = True, None
        for group in self.groups:
            group.freeze()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise if `crop` with this argument would fail."""
        if tokens_to_remove > 0:
            raise HeadsinkError("crop: give the number of tokens to remove as a negative number")
        if -tokens_to_remove > self.seen:
            raise HeadsinkError(f"crop: cannot remove {-tokens_to_remove} tokens of {self.seen}")
        for group in self.groups:
            group.check_crop(-tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens (transformers passes a negative number)."""
        self.check_crop(tokens_to_remove)
        self.layout = None
        for group in self.groups:
            group.crop(-tokens_to_remove)
        self.seen += tokens_to_remove

    def reset(self) -> None:
        self.groups, self.seen, self.is_initialized, self.frozen, self.layout = [], 0, False, False, None

    def offload(self) -> None:
        raise HeadsinkError("offloading the cache is not supported with a plan")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda t: t[indices.to(t.device)])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.layout = None
        for group in self.groups:
            group.map_rows(change)
