"""headsink's place in transformers: an attention function and a mask function under one name.

While a model is *engaged* (`engaged(model)`), its layers call `_attention`. Keys that come from a plan's cache are attended
by that cache; all others (another thread's ordinary cache, a layer with its own sliding window) go to transformers' `sdpa`,
so an engaged model without a plan is the model itself; where `sdpa` cannot express the softmax, it is computed in blocks and
differs by rounding. `observing(callback)` shows every layer's queries, keys, values and output to a callback on the way; the
census is built on that. `substituting(attend)` computes attention by other means; calibration tries patterns so. What is
observed is one whole text without padding, so no mask is made for it, and layers that `sdpa` has no causal kernel for are
computed in blocks (blockwise.py).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from headsink import blockwise
from headsink.blockwise import Inputs
from headsink.cache import ATTENTION, PlanLength, Update
from headsink.errors import HeadsinkError
from headsink.head_group import QUERY_BLOCK
from headsink.rows import Softmax, attend_rows
from headsink.slots import Padding


@dataclass(frozen=True, kw_only=True)
class Seen(Inputs):
    """What one attention layer computed with, and `output`, [1, query heads, tokens, dim], before the output projection."""

    output: Tensor


class Sliding(int):
    """The mask of a sliding layer while it is observed: its window, in place of a square."""


_observer: ContextVar[Callable[[Seen], None] | None] = ContextVar("headsink_observer", default=None)
_substitute: ContextVar[Callable[[Inputs], Tensor] | None] = ContextVar("headsink_substitute", default=None)
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


@contextmanager
def substituting(attend: Callable[[Inputs], Tensor]) -> Iterator[None]:
    """Let `attend` compute the attention of every layer that an engaged model runs in this thread.

    It is given one row of tokens and returns [1, query heads, tokens, dim]; which tokens see which is its own affair.
    """
    token = _substitute.set(attend)
    try:
        yield
    finally:
        _substitute.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Update,
    value: Tensor | Update,
    attention_mask: Tensor | Padding | Sliding | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it. Returns [batch, tokens, query heads, dim]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softmax = Softmax(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    if isinstance(key, Update):
        if not isinstance(attention_mask, Padding | None):
            raise HeadsinkError("a plan takes a 2-D attention mask (1 for tokens, 0 for left padding), not a 4-D one")
        return key.layer.attend(module, query, key, attention_mask, softmax), None
    observer, substitute = _observer.get(), _substitute.get()
    if observer is None and substitute is None:
        if not softmax.plain:
            return _by_blocks(query, key, value, attention_mask, softmax).transpose(1, 2), None  # type: ignore[arg-type]
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise HeadsinkError("observed attention takes one text at a time, whole")
    sliding = int(attention_mask) if isinstance(attention_mask, Sliding) else None
    inputs = Inputs(module, int(module.layer_idx), query, key, value, scale, sliding, *softmax[1:])  # type: ignore[arg-type]
    if substitute is not None:
        return substitute(inputs).transpose(1, 2), None
    if inputs.plain:
        output = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)[0].transpose(
            1, 2
        )
    else:
        output = blockwise.attention(inputs)
    assert observer is not None
    observer(Seen(**{f.name: getattr(inputs, f.name) for f in fields(inputs)}, output=output))
    return output.transpose(1, 2), None


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softmax: Softmax) -> Tensor:
    """What `sdpa` cannot express, over a cache that is not a plan's, in blocks of queries: [batch, query heads, tokens, dim].

    key, value: [batch, KV heads, keys, dim]; mask: bool [batch, 1, tokens, keys], None: causal, the last query sees all keys.
    """
    output, tokens, columns = torch.empty_like(query), query.shape[2], torch.arange(key.shape[2], device=query.device)
    for start in range(0, tokens, QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        seen = (columns <= columns[-tokens:][block, None])[None, None] if mask is None else mask[:, :, block]
        some = seen.flatten(0, 2).any(0).nonzero()  # of a sliding window not many
        near = slice(int(some[0]), int(some[-1]) + 1) if len(some) else slice(0)
        output[:, :, block] = attend_rows(
            query[:, :, block], key[:, :, near], value[:, :, near], seen[..., near], softmax
        )
    return output


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | Padding | Sliding | None:
    """The mask of a layer: transformers' own, or what says the same without a square for a plan's or an observed layer."""
    if _observer.get() is not None or _substitute.get() is not None:
        if attention_mask is not None and not attention_mask.all():
            raise HeadsinkError("observed attention takes one text at a time, without padding")
        return None if local_size is None else Sliding(local_size)
    if not isinstance(kv_length, PlanLength):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
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
