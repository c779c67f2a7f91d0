"""The attention function and the mask function that headsink registers with transformers.

While a model is *engaged* (`engage(model)`), its layers call `_attention`. If the keys come from a plan's cache, the cache
computes the attention. All other attention (another thread's ordinary cache, a layer with its own sliding window) goes to
transformers' `sdpa`, so an engaged model without a plan computes the same as before; where `sdpa` cannot express the softmax,
it is computed in blocks and differs by rounding.

`observe_attention(model, callback)` passes every layer's queries, keys, values and output to a callback, which the census uses.
`replace_attention(model, attend)` replaces the attention, which calibration uses to try patterns. Both process one whole text
without padding, so they need no mask; layers without a causal `sdpa` kernel are computed in blocks (attention/chunked.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from headsink.attention import chunked
from headsink.attention.eager import attend_rows
from headsink.attention.params import QUERY_BLOCK, AttentionParams, Inputs, Padding
from headsink.attention.passes import ATTENTION, check_uncached, engage, watch
from headsink.errors import HeadsinkError
from headsink.models.spec import describe


@dataclass(frozen=True, kw_only=True)
class AttentionRecord(Inputs):
    """The inputs of one attention layer, and `output`, [1, query heads, tokens, dim], before the output projection."""

    output: Tensor


class UnsupportedMask(str):
    """A mask that a plan cannot express, as the reason. A layer with a plan that gets it raises."""

    def __getitem__(self, _: Any) -> Self:
        """The mask of the last queries, as transformers asks for it in Gemma 4."""
        return self


class SlidingWindow(int):
    """The mask of a sliding-window layer that is observed or has a plan's cache: the window as a number, and `padding`."""

    padding: Padding | None = None

    def __getitem__(self, _: Any) -> Self:
        return self


_observer: ContextVar[Callable[[AttentionRecord], None] | None] = ContextVar("headsink_observer", default=None)
_substitute: ContextVar[Callable[[Inputs], Tensor] | None] = ContextVar("headsink_substitute", default=None)


@contextmanager
def observe_attention(
    model: PreTrainedModel, callback: Callable[[AttentionRecord], None], required: Iterable[int] | None = None
) -> Iterator[None]:
    """Call `callback` for every attention layer that the model runs in this thread.

    Raises HeadsinkError at the end of the block if a layer did not run. required: the layers that must; None: all.
    """
    layers_seen: set[int] = set()

    def call(seen: AttentionRecord) -> None:
        layers_seen.add(seen.layer)
        callback(seen)

    with _check_layers(model, _observer, call, layers_seen, required):
        yield


@contextmanager
def replace_attention(model: PreTrainedModel, attend: Callable[[Inputs], Tensor]) -> Iterator[None]:
    """Use `attend` for the attention of every layer that the model runs in this thread.

    It gets one sequence, and returns [1, query heads, tokens, dim]. It decides which tokens are visible. Raises HeadsinkError
    at the end of the block if a layer did not run.
    """
    layers_seen: set[int] = set()

    def call(inputs: Inputs) -> Tensor:
        layers_seen.add(inputs.layer)
        return attend(inputs)

    with _check_layers(model, _substitute, call, layers_seen):
        yield


@contextmanager
def _check_layers(
    model: PreTrainedModel,
    variable: ContextVar[Any],
    call: Callable[..., Any],
    layers_seen: set[int],
    required: Iterable[int] | None = None,
) -> Iterator[None]:
    token = variable.set(call)
    try:
        with engage(model), watch():
            yield
    finally:
        variable.reset(token)
    missing = sorted(set(describe(model).attending if required is None else required) - layers_seen)
    if missing:
        raise HeadsinkError(
            f"{type(model).__name__}: the attention of layer {missing[0]} was not seen; it must go through "
            "transformers' AttentionInterface, and must not be patched, compiled or set to another implementation meanwhile"
        )


COMPUTES = (
    "a plan was not applied: this model computes with the keys or values that its cache returns, before attention; a plan "
    "needs a model that passes them to its attention as they are"
)
GAPS = "attention_mask has gaps, or padding after the text: pad on the left (tokenizer.padding_side = 'left')"


@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Update,
    value: Tensor | Update,
    attention_mask: Tensor | Padding | SlidingWindow | UnsupportedMask | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. Returns [batch, tokens, query heads, dim], contiguous because some models
    take a view of it."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softmax = AttentionParams(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    if isinstance(key, Update):
        padding = _padding(attention_mask, key.layer.sliding)
        query = cast(query)
        with torch.autocast(query.device.type, enabled=False):
            return key.layer.attend(module, query, key, padding, softmax).contiguous(), None
    observer, substitute = _observer.get(), _substitute.get()
    if observer is None and substitute is None:
        check_uncached(module)
        if not softmax.plain:
            return _by_blocks(query, key, value, attention_mask, softmax).transpose(1, 2).contiguous(), None  # type: ignore[arg-type]
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if query.shape[2] != key.shape[2] or (query.shape[0] != 1 and substitute is None):
        raise HeadsinkError("observed attention takes one text at a time, whole")
    sliding = int(attention_mask) if isinstance(attention_mask, SlidingWindow) else None
    inputs = Inputs(module, int(module.layer_idx), query, key, value, scale, sliding, *softmax[1:])  # type: ignore[arg-type]
    if substitute is not None:
        return substitute(inputs).transpose(1, 2).contiguous(), None
    if inputs.plain:
        output = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)[0].transpose(
            1, 2
        )
    else:
        output = chunked.attention(inputs)
    assert observer is not None
    observer(AttentionRecord(**{f.name: getattr(inputs, f.name) for f in fields(inputs)}, output=output))
    return output.transpose(1, 2).contiguous(), None


def _padding(mask: Any, sliding: int | None) -> Padding | None:
    """Return the padding in the mask of a layer with a plan's cache. sliding: the layer's own window."""
    if isinstance(mask, UnsupportedMask):
        raise HeadsinkError(str(mask))
    if not isinstance(mask, Padding | SlidingWindow | None):
        raise HeadsinkError("a plan takes a 2-D attention mask (1 for tokens, 0 for left padding), not a 4-D one")
    window = int(mask) if isinstance(mask, SlidingWindow) else None
    if window != sliding:
        own, given = ("full attention" if one is None else f"a window of {one}" for one in (sliding, window))
        raise HeadsinkError(f"a plan was not applied: a layer with {own} in the configuration got a mask of {given}")
    return mask.padding if isinstance(mask, SlidingWindow) else mask


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softmax: AttentionParams) -> Tensor:
    """Attend over an ordinary cache in blocks of queries, where `sdpa` cannot express the softmax.

    key, value: [batch, KV heads, keys, dim]; mask: bool [batch, 1, tokens, keys]; None: causal, and the last query sees all keys.
    Returns [batch, query heads, tokens, dim].
    """
    output, tokens, columns = torch.empty_like(query), query.shape[2], torch.arange(key.shape[2], device=query.device)
    for start in range(0, tokens, QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        seen = (columns <= columns[-tokens:][block, None])[None, None] if mask is None else mask[:, :, block]
        used = seen.flatten(0, 2).any(0).nonzero()  # few in a sliding window
        near = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0)
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
) -> Tensor | Padding | SlidingWindow | UnsupportedMask | None:
    """Return the mask of a layer: transformers' own, or `Padding` or `SlidingWindow` for a plan's or an observed layer."""
    if _observer.get() is not None or _substitute.get() is not None:
        if attention_mask is not None and not attention_mask.all():
            raise HeadsinkError("observed attention takes one text at a time, without padding")
        return None if local_size is None else SlidingWindow(local_size)
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
    sliding = local_size is not None and _same(mask_function, sliding_window_causal_mask_function(local_size))
    if (
        mask_function is not causal_mask_function and not sliding
    ):  # some models make masks that none of their layers uses
        return UnsupportedMask("a plan works on causal attention only, not on packed sequences or two-way blocks")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, int(kv_length)):
        raise HeadsinkError(
            f"attention_mask: its shape is {list(attention_mask.shape)} and must be [{batch_size}, "
            f"{int(kv_length)}], of all tokens in the cache and the new ones"
        )
    padding = left_padding(attention_mask)
    if padding is not None and padding.hidden is not None and padding.hidden[:, -q_length:].any():
        if q_length != kv_length or (attention_mask.int().diff(dim=1).ne(0).sum(1) > 1 + (padding.tokens > 0)).any():  # type: ignore[union-attr]
            raise HeadsinkError(GAPS)
        padding = replace(padding, hidden=None, right=True)
    if local_size is None:
        return padding
    mask = SlidingWindow(local_size)
    mask.padding = padding
    return mask


def _same(function: Any, other: Any) -> bool:
    """Whether two mask functions of transformers, which are closures over numbers and functions, are the same."""
    if isinstance(function, tuple) and isinstance(other, tuple):
        return len(function) == len(other) and all(map(_same, function, other))
    if not callable(function) or not callable(other) or function is other:
        return bool(function == other)
    inside, others = (getattr(one, "__closure__", None) or () for one in (function, other))
    same_code = getattr(function, "__code__", function) is getattr(other, "__code__", other)
    return same_code and _same(tuple(c.cell_contents for c in inside), tuple(c.cell_contents for c in others))


def left_padding(mask: Tensor | None) -> Padding | None:
    """Return the padding of a 2-D mask [batch, columns], True for tokens; None if there is none."""
    if mask is None or mask.all():
        return None
    mask = mask.bool()
    columns = mask.shape[1]
    tokens = torch.where(mask.any(1), mask.int().argmax(1), columns)  # a row may be padding only
    hidden = ~mask & (torch.arange(columns, device=mask.device) >= tokens[:, None])
    return Padding(tokens, int(tokens.max()), hidden if hidden.any() else None)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


class PlanLength(int):
    """The key length of a `PlanLayer`. Its type marks that the mask function need not build a mask."""


class AttendingLayer(Protocol):
    """A cache layer that computes attention (cache/layer.py). sliding: the model's own window in this layer."""

    sliding: int | None

    def attend(
        self, module: nn.Module, query: Tensor, update: Update, padding: Padding | None, softmax: AttentionParams
    ) -> Tensor: ...


@dataclass(frozen=True)
class Update:
    """New keys and values of a cache layer, which the attention function gets instead of a tensor.

    views: how the layer attended, if later layers attend to the same keys (Gemma 3n).
    """

    layer: AttendingLayer
    key: Tensor
    value: Tensor
    views: list[Any] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        return self.key.shape

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise HeadsinkError(COMPUTES)

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise HeadsinkError(COMPUTES)


def cast(tensor: Tensor) -> Tensor:
    """Cast to the dtype of `torch.autocast` if it is enabled, as `sdpa` does."""
    kind = tensor.device.type
    enabled = torch.is_autocast_enabled(kind) and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return tensor.to(torch.get_autocast_dtype(kind)) if enabled else tensor
