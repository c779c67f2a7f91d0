"""A decode step on a GPU: the model's own forward pass of one token of every text, as a CUDA graph.

The first token goes through the model as ever, which compiles what there is to compile. The second is recorded: attention
lets it in and attends by kernels that read the length of the text from the card (enter.py, attention.py), so that nothing
in the pass depends on the host. From then on a token is one launch of the graph. When buffers grow or a head begins to let
keys go, the table of addresses is written anew, in its place; the graph stays.

Any model that a plan can run will do, unless layers of its own slide: transformers' cache of those grows with every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.cuda.table import DeviceTable
from headsink.cache.cache import PlanCache
from headsink.cache.kv_table import KVTable
from headsink.cache.layer import PlanLayer
from headsink.errors import HeadsinkError, must_be
from headsink.generation.step_checks import Held
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument
from headsink.utils import device as gpu

AHEAD = 64  # tokens that buffers are made ready for at once


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model cannot decode here; None if it can."""
    shape = describe(model)
    if not gpu.installed():
        return "triton is not installed: pip install 'headsink[gpu]'"
    if any(shape.windows):
        return "layers of this model slide by themselves"
    if not shape.prefix_free:
        return "its rotary positions depend on the length of the text"
    if model.training:
        return "it is in training mode: call model.eval()"
    if len({weight.device for weight in model.parameters()}) > 1:
        return "its weights are on several devices"
    if model.dtype not in gpu.TYPES:
        return f"it is in {str(model.dtype).removeprefix('torch.')}"
    return None


def prepare(model: PreTrainedModel) -> None:
    """The kernels are compiled with the first token."""


class Pass:
    """The model's pass over so many tokens of every text, in memory of its own: run once, then recorded, then replayed."""

    def __init__(self, texts: int, tokens: int, device: torch.device):
        self.token, self.place = torch.zeros(2, texts, tokens, dtype=torch.int64, device=device)
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
    """A model and a cache that holds a text. Neither may be changed by others in between, but for `resume`."""

    def __init__(self, model: PreTrainedModel, cache: PlanCache):
        self.model, self.cache, self.shape = model, cache, describe(model)
        self.layers = [layer for layer in cache.layers if isinstance(layer, PlanLayer)]
        self.parameters = list(model.parameters())
        self.weights = [weight.detach() for weight in self.parameters]  # which a graph has the addresses of
        self.columns = torch.zeros(1, dtype=torch.int64, device=model.device)  # that have come in
        self.tables = self.columns.new_zeros(0)  # of all layers
        self.passes: dict[int, Pass] = {}  # by their number of tokens
        self.buffers: list[Any] = []
        self.resume()

    def resume(self) -> None:
        """Go on after the cache was changed by others."""
        self.held = Held(self.shape, self.layers, self.model.dtype)
        self.length = self.held.length
        if self.buffers == self._buffers():
            self.columns.fill_(self.length)
        else:
            self.ready = self.length

    def _buffers(self) -> list[Any]:
        """What the tables say, but for what is read from the card: they need be written again if this changes."""
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

    def run(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Let a token of every text in, int64 [texts]. places: their positions, if they are not those of the columns.

        Returns the logits of what follows, float32 [texts, vocabulary].
        """
        return self.read(tokens[:, None], None if places is None else places[:, None])[:, 0]

    def read(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Let some tokens of every text in, int64 [texts, tokens]; more than one where nothing is let go.

        Returns the logits of what follows each of them, float32 [texts, tokens, vocabulary].
        """
        count = tokens.shape[1]
        self.held.check(tuple(tokens.shape[:-1]))
        if self.parameters[0].data_ptr() != self.weights[0].data_ptr():
            raise HeadsinkError("decode: the model was changed since the step was made: make a new one")
        if places is not None:
            must_be("decode: positions", places.shape, tokens.shape)
        if count > 1 and any(group.evicts for layer in self.layers for group in layer.groups):
            raise HeadsinkError("decode: several tokens at once, where keys are let go; give one after the other")
        if self.length + count > self.ready:
            self._make_ready(count)
        self.cache.plan.check_length(self.length + count, self.shape.max_context)
        if self.length == self.cache.plan.verified:  # of a prompt beyond it the model's pass has warned
            self.cache.plan.warn_beyond_verified(self.length + 1)
        if places is None:
            columns = torch.arange(self.length, self.length + count, device=tokens.device)
            places = (columns - self.pads[:, None]).clamp(min=0)
        if count not in self.passes:
            self.passes[count] = Pass(len(tokens), count, self.columns.device)
        one = self.passes[count]
        one.token.copy_(tokens)
        one.place.copy_(places)
        one.run(self._pass)
        self.length += count
        return one.logits.clone()

    def start_evicting(self) -> None:
        """Tell the cache what has come in."""
        for layer in self.layers:
            layer.seen = self.length
            for group in layer.groups:
                group.length = self.length
        self.held.length = self.length

    def take(self, other: PlanCache, count: int) -> None:
        """Let in the last columns of another cache of the model, as they are. Neither lets anything go."""
        from headsink.attention.cuda.append import append_keys

        if self.length + count > self.ready:
            self._make_ready(count)
        kind = self.layers[0].groups[0].keys.dtype
        for theirs, table in zip(other.layers, self.tables, strict=True):
            key, value = theirs.groups[0].last(count)  # type: ignore[attr-defined]
            must_be("decode: keys of the other cache", (key.dtype, key.shape[3]), (kind, self.shape.head_dim))
            append_keys(key.contiguous(), value.contiguous(), table, self.columns)
        self.columns.add_(count)
        self.length += count

    def hide(self, hidden: Tensor) -> None:
        """Of the last columns, those that a row is not to see: bool [texts, columns]. Nothing may be let go any more."""
        from headsink.attention.cuda.append import hide

        hide(hidden, self.tables, self.columns)
        for group in (group for layer in self.layers for group in layer.groups):
            group.holes = True

    def _pass(self, one: Pass) -> None:
        """The model, over what lies in `one`, to its logits. Reads nothing from the host."""
        for layer, table in zip(self.layers, self.tables, strict=True):
            layer.on_card = DeviceTable(table, self.columns)
        try:
            with torch.no_grad():
                found = self.model(one.token, position_ids=one.place, **cache_argument(self.cache), use_cache=True)
                one.logits = found.logits.float()
            self.columns.add_(one.token.shape[1])
        finally:
            for layer in self.layers:
                layer.on_card = None

    def _make_ready(self, tokens: int) -> None:
        """Room in the buffers for the next tokens, and the tables of what lies where."""
        self.start_evicting()
        for layer in self.layers:
            layer.layout = None  # buffers may move now, and it has their addresses
        layouts = [KVTable(layer.groups, max(AHEAD, tokens)) for layer in self.layers]
        self.held = Held(self.shape, self.layers, self.model.dtype)  # buffers may have grown
        self.ready = min(self.length + max(AHEAD, tokens), *(layout.until for layout in layouts))
        must_be("decode: there is room for the tokens", self.length + tokens <= self.ready, True)
        tables = torch.from_numpy(np.stack([layout.table for layout in layouts]))
        if tables.shape != self.tables.shape:  # other texts than before
            self.tables, self.passes = torch.empty_like(tables, device=self.columns.device), {}
        self.tables.copy_(tables)
        self.buffers = self._buffers()
        self.columns.fill_(self.length)
        padding = self.layers[0].groups[0].padding
        self.pads = self.columns.new_zeros(tables.shape[1]) if padding is None else padding.tokens
