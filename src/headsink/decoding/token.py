"""Passes of one token per sequence by the compiled decode step (step.py), inside `with headsink.apply(model, plan):`.

attention/passes.py asks for each pass of the model whether the step can take its place. It can if the caller would see no
difference but rounding: the model gets tokens, a mask of left padding, positions and a filled cache, and returns logits.
Other passes run the model: prompts, gradients, hooks on layers, hidden states, caches that record tokens.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headsink.attention.passes import changed
from headsink.attention.scopes import Step
from headsink.cache.cache import PlanCache
from headsink.cache.layer import PlanLayer
from headsink.decoding.step import Decoder, decoder, prepare, refusal
from headsink.errors import HeadsinkError
from headsink.models.distributed import input_device
from headsink.models.spec import unwrap
from headsink.models.transformers_names import NAMES
from headsink.plan.plan import Plan
from headsink.utils import device

READ = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep", *NAMES}
# settings of a model that add to its output
MORE = "output_hidden_states", "output_attentions", "output_router_logits"


class _Kept:
    """The step of a cache, with what tells whether other code has changed the model or the cache since its last token."""

    def __init__(self, model: PreTrainedModel, cache: PlanCache):
        self.step: Decoder = decoder(model, cache)
        self.step.warns = False  # `apply` does
        self.layers = [layer for layer in cache.layers if isinstance(layer, PlanLayer)]
        self.attended = self.layers[0].attended
        self.parts = [part for part in model.modules() if part is not model]
        self.places = [(part._parameters, name) for part in model.modules() for name in part._parameters]
        self.children = [(part._modules, name) for part in model.modules() for name in part._modules]
        self.read = self._read()

    def _read(self) -> list[Any]:
        """Return what identifies the parts and the weights that the step reads."""
        weights = (own[name] for own, name in self.places)
        found: list[Any] = [(id(weight), weight.data_ptr()) for weight in weights if weight is not None]
        return found + [id(own.get(name)) for own, name in self.children]

    @property
    def current(self) -> bool:
        """Whether the model has the parts and the weights that the step reads."""
        return self.read == self._read()

    def run(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        if self.attended != self.layers[0].attended or not self.step.cache_check.same:
            self.step.resume()
        logits = self.step.run(tokens, positions)
        self.step.start_evicting()
        for layer in self.layers:
            layer.attended += 1
        self.attended = self.layers[0].attended
        return logits


class TokenSteps:
    """The compiled steps of a model in an `apply` block, one for each cache.

    required: use steps on a GPU too, and raise HeadsinkError with the reason if the model has none. Otherwise they are used on a
    CPU, if the model has them.
    """

    def __init__(self, model: nn.Module, plan: Plan, required: bool):
        self.model: PreTrainedModel = unwrap(model)
        # None: the model has no step for the cache
        self.kept: weakref.WeakKeyDictionary[PlanCache, _Kept | None] = weakref.WeakKeyDictionary()
        self.several_axes = any(hasattr(module, "get_rope_index") for module in self.model.modules())
        kind = input_device(self.model).type
        self.off = not required and (kind != "cpu" or kind in device.DEVICES)
        if required and (reason := refusal(self.model, plan)):
            raise HeadsinkError(f"compiled: {reason}")

    def find(self, given: dict[str, Any], cache: PlanCache) -> Step | None:
        """Return what runs a pass in place of the model, None if the model has to. given: the arguments of the pass."""
        if self.off or (cache in self.kept and self.kept[cache] is None):
            return None
        if torch.is_grad_enabled() or not self._reads(given, cache) or not self._unchanged(cache):
            return None
        positions = _positions(given["position_ids"], cache) if given.get("position_ids") is not None else None
        if cache not in self.kept:
            self.kept[cache] = self._make(cache)
        kept, tokens = self.kept[cache], given["input_ids"][:, 0]
        return None if kept is None else lambda: kept.run(tokens, positions).to(self.model.dtype)

    def _make(self, cache: PlanCache) -> _Kept | None:
        if refusal(self.model, cache.plan):
            return None
        with _notice():
            prepare(self.model, cache.kv_dtype)
        return _Kept(self.model, cache)

    def _reads(self, given: dict[str, Any], cache: PlanCache) -> bool:
        """Whether the step knows all arguments of a pass, and the cache is one that it can continue."""
        others = (value for name, value in given.items() if name not in READ)
        if any(value is not None and value is not False for value in others) or given.get("use_cache") is False:
            return False
        config = self.model.config
        if any(getattr(config, name, False) for name in MORE) or given.get("return_dict", config.return_dict) is False:
            return False
        keep = given.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep not in (0, 1):  # it may be a tensor of indices
            return False
        tokens, length = given.get("input_ids"), cache.get_seq_length()
        if tokens is None or tokens.dim() != 2 or tokens.shape[1] != 1 or not length:
            return False
        layers = [layer for layer in cache.layers if isinstance(layer, PlanLayer)]
        if len(layers) < len(cache.layers) or any(layer.recording or layer.on_card for layer in layers):
            return False
        if cache.exact and cache.kv_dtype == "auto" and _own_outputs(cache.plan, layers):
            return False
        return self._reads_positions(given.get("position_ids"), cache) and _reads_mask(
            given.get("attention_mask"), cache, length
        )

    def _reads_positions(self, positions: Tensor | None, cache: PlanCache) -> bool:
        if positions is None:  # the model counts columns
            return cache.padding is None and not self.several_axes
        return positions.dim() == 2 and positions.shape[1] == 1

    def _unchanged(self, cache: PlanCache) -> bool:
        """Whether the model is as its step expects it. Forgets a step with other parts or weights."""
        kept = self.kept.get(cache)
        parts = [part for part in self.model.modules() if part is not self.model] if kept is None else kept.parts
        if self.model.training or changed(self.model, parts):
            return False
        kind = input_device(self.model).type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != self.model.dtype:
            return False
        if kept is not None and not kept.current:
            del self.kept[cache]
        return True


def _own_outputs(plan: Plan, layers: list[PlanLayer]) -> bool:
    """Whether a plan gives the model's own outputs, bit for bit."""
    full = all(head.pattern.full for heads in plan.layers for head in heads or ())
    return full and not any(layer.sliding for layer in layers)


def _reads_mask(mask: Any, cache: PlanCache, length: int) -> bool:
    """Whether a mask is that of the cached sequences and one new token each."""
    padding = cache.padding
    if padding is not None and (padding.right or padding.hidden is not None):
        return False
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != length + 1:
        return False
    if padding is None:
        return bool(mask.all())
    columns = torch.arange(length + 1, device=mask.device)
    return torch.equal(mask.bool(), columns >= padding.tokens.to(mask.device)[:, None])


def _positions(given: Tensor, cache: PlanCache) -> Tensor | None:
    """Return the positions of new tokens, int64 [sequences]; None if they follow the cached ones. given: [sequences or 1, 1]."""
    found, padding = given[:, 0].expand(cache.rows), cache.padding
    follow = cache.get_seq_length() - (0 if padding is None else padding.tokens)
    return None if found.device.type == "cpu" and bool((found == follow).all()) else found


@contextmanager
def _notice() -> Iterator[None]:
    """Say what takes long, if it does."""
    what = "headsink compiles the decode step: about a minute, once on a machine"
    timer = threading.Timer(2, logging.getLogger("headsink").warning, [what])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
