"""Decode step on a GPU: the model's forward pass of one token per sequence, as a CUDA graph.

The first token runs through the model without a graph, which compiles all kernels. The second token is captured: the kernels
that append keys and attend (attention/cuda/append.py, attention/cuda/decode.py) read the length from device memory, so nothing in
the pass depends on the host. After that a token is one launch of the graph. When buffers grow or a head starts evicting, the
table of addresses is rewritten in place and the graph stays valid.

Every model that a plan supports works, unless it has sliding-window layers: their transformers cache grows with every token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.cuda.table import DeviceTable
from headsink.attention.formats import KVDtype
from headsink.cache.cache import PlanCache
from headsink.cache.kv_table import KVTable
from headsink.cache.layer import PlanLayer
from headsink.decoding.checks import CacheCheck
from headsink.errors import HeadsinkError, must_be
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument
from headsink.utils import device as gpu

AHEAD = 64  # tokens that buffers are allocated for at once


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model has no compiled decode step; None if it has one."""
    shape = describe(model)
    if not gpu.triton_installed():
        return "triton is not installed: pip install 'headsink[gpu]'"
    if shape.other_kinds:
        return f"this model has layers of kind {shape.other_kinds}"
    if not shape.prefix_free:
        return "its rotary positions depend on the length of the sequence"
    if model.training:
        return "it is in training mode: call model.eval()"
    if any(weight.is_meta for weight in model.parameters()):
        return "its weights are offloaded"
    if len({weight.device for weight in model.parameters()}) > 1:
        return "its weights are on several devices"
    if model.dtype not in gpu.TYPES:
        return f"its dtype is {str(model.dtype).removeprefix('torch.')}"
    return None


def prepare(model: PreTrainedModel, kv_dtype: KVDtype) -> None:
    """Nothing to do: kernels are compiled with the first token."""


class Pass:
    """A forward pass over a fixed number of tokens per sequence: run once, then captured as a CUDA graph, then replayed."""

    def __init__(self, sequences: int, tokens: int, device: torch.device):
        self.token, self.place = torch.zeros(2, sequences, tokens, dtype=torch.int64, device=device)
        self.logits = torch.empty(0)
        self.runs = 0
        self.graph: Any = None

    def run(self, work: Callable[[Pass], None]) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.runs and self.token.device.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                work(self)
            self.graph.replay()
        else:
            work(self)
        self.runs += 1


class Decoder:
    """A decode step for a model and a filled cache. Call `resume` after any other code has changed the cache."""

    def __init__(self, model: PreTrainedModel, cache: PlanCache):
        self.model, self.cache, self.shape = model, weakref.ref(cache), describe(model)
        self.plan, self.warns = cache.plan, True
        self.layers = [layer for layer in cache.layers if isinstance(layer, PlanLayer)]
        self.parameters = list(model.parameters())
        self.weights = [weight.detach() for weight in self.parameters]  # kept alive: a graph has their addresses
        self.columns = torch.zeros(1, dtype=torch.int64, device=model.device)  # number of tokens in the cache
        self.tables = self.columns.new_zeros(0)  # KV tables of all layers
        self.passes: dict[int, Pass] = {}  # by their number of tokens
        self.buffers: list[Any] = []
        self.resume()

    def resume(self) -> None:
        """Continue after other code has changed the cache."""
        self.cache_check = CacheCheck(self.shape, self.layers, self.model.dtype)
        self.length = self.cache_check.length
        if self.buffers == self._buffers():
            self.columns.fill_(self.length)
        else:
            self.ready = self.length

    def _buffers(self) -> list[Any]:
        """The contents of the tables except what kernels read from device memory. If it changes, the tables must be rewritten."""
        groups = [group for layer in self.layers for group in layer.groups]
        return [
            (
                *(t.data_ptr() for t in (g.keys, g.values, g.visible)),
                g.keys.shape,
                g.prefix_slots,
                g.start,
                g.window,
                g.padding,
            )
            for g in groups
        ]

    def run(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append one token per sequence, int64 [sequences]. positions: by default they follow the cached tokens.

        Returns the logits of the next tokens, float32 [sequences, vocabulary].
        """
        return self.read(tokens[:, None], None if positions is None else positions[:, None])[:, 0]

    def read(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append tokens to every sequence, int64 [sequences, tokens]; several at once only if no head evicts.

        Returns the logits after each of them, float32 [sequences, tokens, vocabulary].
        """
        count = tokens.shape[1]
        self.cache_check.check(tuple(tokens.shape[:-1]))
        if self.parameters[0].data_ptr() != self.weights[0].data_ptr():
            raise HeadsinkError("decode: the model was changed since the step was made: make a new one")
        if positions is not None:
            must_be("decode: positions", positions.shape, tokens.shape)
        if count > 1 and any(group.evicts for layer in self.layers for group in layer.groups):
            raise HeadsinkError("decode: several tokens at once in a cache that evicts; give one after the other")
        if self.length + count > self.ready:
            self._make_ready(count)
        self.plan.check_length(self.length + count, self.shape.max_context)
        if self.warns and self.length == self.plan.verified:  # for longer prompts the prefill has warned already
            self.plan.warn_beyond_verified(self.length + 1)
        if positions is None:
            columns = torch.arange(self.length, self.length + count, device=tokens.device)
            positions = (columns - self.pads[:, None]).clamp(min=0)
        if count not in self.passes:
            self.passes[count] = Pass(len(tokens), count, self.columns.device)
        one = self.passes[count]
        one.token.copy_(tokens)
        one.place.copy_(positions)
        one.run(self._pass)
        self.length += count
        return one.logits.clone()

    def start_evicting(self) -> None:
        """Update the cache's lengths with the tokens that were appended."""
        for layer in self.layers:
            layer.seen = self.length
            for group in layer.groups:
                group.length = self.length
        self.cache_check.length = self.length

    def take(self, other: PlanCache, count: int) -> None:
        """Append the last `count` columns of another cache of the model. Neither cache may evict."""
        from headsink.attention.cuda.append import append_keys

        if self.length + count > self.ready:
            self._make_ready(count)
        first = self.layers[0].groups[0]
        for theirs, table in zip(other.layers, self.tables, strict=True):
            key, value = theirs.groups[0].last(count)  # type: ignore[attr-defined]
            must_be("decode: keys of the other cache", (key.dtype, key.shape[3]), (first.dtype, self.shape.head_dim))
            append_keys(key.contiguous(), value.contiguous(), table, self.columns, first.quantized)
        self.columns.add_(count)
        self.length += count

    def hide(self, hidden: Tensor) -> None:
        """Hide some of the last columns from rows: bool [sequences, columns]. The cache must be frozen."""
        from headsink.attention.cuda.append import hide

        hide(hidden, self.tables, self.columns)
        for group in (group for layer in self.layers for group in layer.groups):
            group.holes = True

    def _pass(self, one: Pass) -> None:
        """Run the model over the tokens of a pass and write its logits. Does not synchronise with the host."""
        for layer, table in zip(self.layers, self.tables, strict=True):
            layer.on_card = DeviceTable(table, self.columns, layer.groups[0].quantized)
        try:
            with torch.no_grad():
                output = self.model(one.token, position_ids=one.place, **cache_argument(self.cache()), use_cache=True)
                one.logits = output.logits.float()
            self.columns.add_(one.token.shape[1])
        finally:
            for layer in self.layers:
                layer.on_card = None

    def _make_ready(self, tokens: int) -> None:
        """Allocate room in the buffers for the next tokens and rebuild the KV tables."""
        self.start_evicting()
        for layer in self.layers:
            layer.layout = None  # it has the addresses of buffers that may move now
        layouts = [KVTable(layer.groups, max(AHEAD, tokens)) for layer in self.layers]
        self.cache_check = CacheCheck(self.shape, self.layers, self.model.dtype)  # buffers may have been reallocated
        self.ready = min(self.length + max(AHEAD, tokens), *(layout.until for layout in layouts))
        must_be("decode: there is room for the tokens", self.length + tokens <= self.ready, True)
        tables = torch.from_numpy(np.stack([layout.table for layout in layouts]))
        if tables.shape != self.tables.shape:  # another number of sequences
            self.tables, self.passes = torch.empty_like(tables, device=self.columns.device), {}
        self.tables.copy_(tables)
        self.buffers = self._buffers()
        self.columns.fill_(self.length)
        padding = self.layers[0].groups[0].padding
        self.pads = self.columns.new_zeros(tables.shape[1]) if padding is None else padding.tokens
