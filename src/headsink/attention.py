"""headsink's place in transformers: an attention function and a mask function under one name.

While a model is *engaged* (`engaged(model)`), its layers call `_attention`. Keys that come from a plan's cache are attended by
that cache; all others (another thread's ordinary cache, a layer with its own sliding window) go to transformers'
`sdpa`, so an engaged model without a plan is the model itself. `observing(callback)` shows every layer's queries, keys and
values to a callback on the way; the census and the calibration are built on that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from headsink.cache import ATTENTION, Padding, PlanLength, Update
from headsink.errors import HeadsinkError


@dataclass(frozen=True)
class Seen:
    """What one attention layer computed with: all [batch, heads, tokens, dim], rotary positions applied.

    `output` is the attention output before the output projection, `scaling` the factor on the logits.
    """

    module: nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scaling: float


_observer: ContextVar[Callable[[Seen], None] | None] = ContextVar("headsink_observer", default=None)
_engaged: weakref.WeakKeyDictionary[nn.Module, tuple[int, str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def engaged(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention through headsink until the last such block ends."""
    with _lock:
        depth, before = _engaged.get(model, (0, model.config._attn_implementation))
        if not depth:
            model.set_attn_implementation(ATTENTION)
        _engaged[model] = depth + 1, before
    try:
        yield
    finally:
        with _lock:
            depth, before = _engaged.pop(model)
            if depth > 1:
                _engaged[model] = depth - 1, before
            else:
                model.set_attn_implementation(before)


@contextmanager
def observing(callback: Callable[[Seen], None]) -> Iterator[None]:
    """Call `callback` for every attention layer that an engaged model runs in this thread."""
    token = _observer.set(callback)
    try:
        yield
    finally:
        _observer.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Update,
    value: Tensor | Update,
    attention_mask: Tensor | Padding | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it. Returns [batch, tokens, query heads, dim]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Update):
        if isinstance(attention_mask, Tensor):
            raise HeadsinkError("a plan takes a 2-D attention mask (1 for tokens, 0 for left padding), not a 4-D one")
        return key.layer.attend(module, query, key, attention_mask, scale), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if (observer := _observer.get()) is not None:
        observer(Seen(module, int(module.layer_idx), query, key, value, output.transpose(1, 2), scale))  # type: ignore[arg-type]
    return output, None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | Padding | None:
    """The mask of a layer: transformers' own, or for a plan's layer just the padding, never a square."""
    if not isinstance(kv_length, PlanLength):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if mask_function is not causal_mask_function:
        raise HeadsinkError("a plan works on causal attention only, not on packed sequences or two-way blocks")
    return left_padding(attention_mask)


def left_padding(mask: Tensor | None) -> Padding | None:
    """Read the padding off a 2-D mask [batch, columns], True for tokens. None where there is none."""
    if mask is None or mask.all():
        return None
    mask = mask.bool()
    columns = mask.shape[1]
    tokens = torch.where(mask.any(1), mask.int().argmax(1), columns)  # a row may be padding only, so far
    ends = columns - mask.flip(1).int().argmax(1)
    if not ((ends - tokens == mask.sum(1)) | (tokens == columns)).all():
        raise HeadsinkError("attention_mask has gaps: pad on the left")
    return Padding(tokens, int(tokens.max()))


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
