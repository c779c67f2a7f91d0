"""Run a model under a plan: `with apply(model, plan): model.generate(...)`.

The model is not modified. Its attention goes through transformers' `AttentionInterface` (attention/interface.py), and the plan
belongs to the KV cache (cache/cache.py). Inside `apply`, in every thread (attention/passes.py), a call without a cache gets one
with the plan's shape; a cache from `new_cache` keeps its own plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from headsink.attention.formats import KVDtype
from headsink.attention.passes import enter_scope
from headsink.attention.rotary import layer_rotations
from headsink.cache.cache import PlanCache
from headsink.cache.segments import PrefillOptions
from headsink.decoding.token import TokenSteps
from headsink.errors import HeadsinkError
from headsink.models.distributed import input_device
from headsink.models.spec import Architecture, decoder, unwrap
from headsink.models.transformers_names import assists, given_cache
from headsink.plan.plan import Plan
from headsink.runtime.options import check_kv_dtype, check_prefill

Prefill = Literal["dense", "sparse"]


def new_cache(
    model: PreTrainedModel,
    plan: Plan,
    exact: bool = True,
    *,
    prefill: Prefill = "dense",
    chunk_size: int | None = None,
    kv_dtype: KVDtype = "auto",
) -> PlanCache:
    """An empty KV cache that keeps what `plan` keeps. Use it inside `apply(model, ...)`.

    prefill: "dense" reads a call of several tokens in full attention to all cached keys and to the call; then every head evicts,
    layer by layer, so the peak is the plan and the full keys of one layer. "sparse" evicts while it reads, token by token: the
    first token comes earlier, at a price in quality. Plans with cache-relative positions are always read sparsely. chunk_size:
    with dense prefill, also evict at columns that are multiples of it, in long prompts; None: only at the end of a call.

    exact: compute layers with full attention by the same call as transformers, so that outputs are equal bit for bit. Models with
    sliding windows, soft-capped logits (Gemma 2) or learned sink logits (gpt-oss) differ by rounding. If False, use the fastest
    kernel: on a CPU headsink's own, which are faster in prefill and decoding and differ by rounding.

    kv_dtype: "int8" caches keys and values in 8 bits with a scale for each of them, about half of the bytes of bfloat16. "k8v4"
    caches values in 4 bits, about 0.42 of the bytes of bfloat16, on CPUs only. The queries of a dense prompt see the prompt as it
    was before rounding. "auto": the model's dtype. Raises HeadsinkError if the plan was made for another model, for a chunk_size
    below 1, another `prefill` or `kv_dtype`, and if a head size is not a multiple of 4 ("int8") or 32 ("k8v4").
    """
    return _cache(model, plan, plan.check(model), exact, prefill, chunk_size, kv_dtype)


def _cache(
    model: PreTrainedModel,
    plan: Plan,
    shape: Architecture,
    exact: bool,
    prefill: Prefill,
    chunk_size: int | None,
    kv_dtype: KVDtype,
) -> PlanCache:
    check_prefill(prefill, chunk_size)
    check_kv_dtype(kv_dtype)
    if kv_dtype == "k8v4" and (device := input_device(model).type) != "cpu":
        raise HeadsinkError(f"kv_dtype: 'k8v4' runs on CPUs only, and the model is on {device}; use 'int8'")
    streaming = plan.positions == "cache-relative"
    dense = prefill == "dense" and not streaming
    rotations = layer_rotations(model) if streaming or (dense and plan.has_top_k) else None
    if streaming and any(own and found is None for own, found in zip(shape.planned, rotations or (), strict=True)):
        raise HeadsinkError(
            f"positions: {shape.name} does not support cache-relative ones: its queries are not rotated by position in the usual "
            "way, or the rotation depends on the length of the text; use 'absolute'"
        )
    cache = PlanCache(plan, shape, rotations, exact, PrefillOptions(dense, chunk_size if dense else None), kv_dtype)
    cache.model = weakref.ref(unwrap(model))
    return cache


def check_mask(mask: Tensor | None, rows: int, tokens: int, columns: int | None = None) -> None:
    """Raise unless a mask has shape [rows, tokens] and pads on the left. columns: width of an all-ones mask passed as None."""
    shape = (rows if mask is None else len(mask), mask.shape[1] if mask is not None else columns or tokens)
    if shape != (rows, tokens):
        raise HeadsinkError(f"attention_mask: its shape is {list(shape)} and must be [{rows}, {tokens}]")
    if mask is not None and not mask[:, -1].all():
        raise HeadsinkError("attention_mask: it pads on the right; pad on the left (tokenizer.padding_side = 'left')")


@contextmanager
def apply(
    model: PreTrainedModel,
    plan: Plan,
    exact: bool = True,
    *,
    prefill: Prefill = "dense",
    chunk_size: int | None = None,
    kv_dtype: KVDtype = "auto",
    compiled: bool | None = None,
) -> Iterator[PreTrainedModel]:
    """Inside the block, `generate` and plain forward passes of the model use `plan`, in every thread.

    A call without a cache gets a new one with the plan's shape. An empty `DynamicCache` is converted to one in place. A cache
    from `new_cache` uses its own plan. A thread that enters an `apply` block of its own uses that block's plan. exact, prefill,
    chunk_size, kv_dtype: as for `new_cache`.

    compiled: a pass of one token per sequence is one compiled call, by numba on a CPU and as a CUDA graph on a GPU; its logits
    differ from the model's by rounding. None: on CPUs, for models that have such a step. True: on GPUs too; raises HeadsinkError
    with the reason if the model has none. False: the model runs every pass. In any case the model runs prompts, passes with
    gradients, hooks on layers or further outputs, and all passes under an all-full plan that is to be `exact`.

    Warns once if a sequence grows longer than the contexts that the plan's quality was measured at. Raises HeadsinkError if the
    plan was made for another model, and for invalid options; inside the block, for sequences over the model's maximum (unless the
    plan's positions are cache-relative), for calls that do not work under a plan, and if a layer's attention did not go through
    the plan.
    """
    calls = _Calls(model, plan, exact, prefill, chunk_size, kv_dtype)
    step = None if compiled is False else TokenSteps(model, plan, bool(compiled)).find
    with enter_scope(model, plan, calls.prepare, step=step):
        yield model


@contextmanager
def apply_here(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """As `apply`, but for calls from this block only; other threads keep the plan that is applied to the model elsewhere."""
    with enter_scope(model, plan, _Calls(model, plan).prepare, private=True):
        yield


@contextmanager
def full_cache(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside the block the model uses the full cache, even within an `apply` block. For calls from this block only."""
    with enter_scope(model, None, None, private=True):
        yield model


class _Calls:
    """The forward passes inside an `apply` block: makes and checks their caches."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        exact: bool = True,
        prefill: Prefill = "dense",
        chunk_size: int | None = None,
        kv_dtype: KVDtype = "auto",
    ):
        self.model, self.plan, self.shape = model, plan, plan.check(model)
        self.options = exact, prefill, chunk_size, kv_dtype
        self._new()  # raises for invalid options
        self.warned = False

    def prepare(self, given: dict[str, Any], returned: bool) -> PlanCache:
        """The cache for a forward pass. given: its arguments. kept: whether the cache is returned to the caller. Raises
        HeadsinkError for calls that cannot run under a plan."""
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if tokens is None or not tokens.shape[1]:
            raise HeadsinkError("the model was called without tokens; give input_ids or inputs_embeds with one or more")
        if given.get("token_type_ids") is not None and not given["token_type_ids"].any():
            given["token_type_ids"] = (
                None  # without images (Gemma 3) it has no effect, but the model would build a mask
            )
        cache = given_cache(given)
        _refuse(decoder(self.model), given, returned)
        if cache is None:
            cache = self._new()
        elif type(cache) is DynamicCache and not cache.get_seq_length() and not cache.offloading:
            self._adopt(cache)
        elif not isinstance(cache, PlanCache):
            raise HeadsinkError(_refusal(cache))
        elif not self._owns(cache):
            raise HeadsinkError("this cache was made for another model: start with headsink.new_cache(model, plan)")
        cache.check_whole()
        rows, count = tokens.shape[:2]
        positions = given.get("position_ids")
        if positions is not None and positions.shape[-1] not in (1, count):
            raise HeadsinkError(
                f"position_ids: {list(positions.shape)} do not fit {rows} sequences of {count} new tokens"
            )
        if cache.rows == 1 and rows > 1:
            cache.batch_repeat_interleave(rows)
        elif cache.rows not in (0, rows):
            raise HeadsinkError(
                f"this cache holds {cache.rows} sequences and the model was given {rows}; give as many, or a cache of "
                "one sequence, which is repeated"
            )
        _check_columns(given, cache)
        length = cache.get_seq_length() + count
        cache.plan.check_length(length, self.shape.max_context)
        if not self.warned:
            self.warned = cache.plan.warn_beyond_verified(length)
        return cache

    def _owns(self, cache: PlanCache) -> bool:
        """Whether a cache was made for this model, or for a model with the weights that this plan is for."""
        made_here = cache.model is not None and cache.model() is unwrap(self.model)
        return made_here or cache.plan is self.plan or cache.plan.model == self.plan.model

    def _new(self) -> PlanCache:
        return _cache(self.model, self.plan, self.shape, *self.options)

    def _adopt(self, cache: DynamicCache) -> None:
        """Convert an empty `DynamicCache` in place, so that the caller's reference to it is filled."""
        records = any(getattr(layer, "record_past", False) for layer in cache.layers) or assists()
        cache.__class__ = PlanCache
        cache.__dict__.update(self._new().__dict__)
        if records:
            cache.activate_past_recording()


def _refuse(stack: Any, given: dict[str, Any], returned: bool) -> None:
    """Raise for arguments that are not supported under a plan."""
    if getattr(stack, "gradient_checkpointing", False) and stack.training and torch.is_grad_enabled():
        raise HeadsinkError(
            "gradient checkpointing drops the KV cache, and the plan with it: call "
            "model.gradient_checkpointing_disable(), or model.eval()"
        )
    positions = given.get("position_ids")
    if (
        not returned
        and given.get("attention_mask") is None
        and positions is not None
        and positions.dim() == 2
        and (positions.diff(dim=1) != 1).any()
    ):
        raise HeadsinkError(
            "position_ids start again within a row, as in packed documents; a plan needs one document per row, padded on the left"
        )


def _check_columns(given: dict[str, Any], cache: PlanCache) -> None:
    """Raise unless the mask and positions of the new tokens continue the cached sequence."""
    length, padding = cache.get_seq_length(), cache.padding
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    first = positions[:, 0] if positions is not None and positions.dim() == 2 else None
    if not length or cache.on_card:  # the CUDA decode step gives correct positions, and must not synchronise
        return
    pads = torch.zeros(1, dtype=torch.int64) if padding is None else padding.tokens
    if (
        padding is None and mask is not None and mask.dim() == 2
    ):  # no layer has patterns, so the cache does not record padding
        pads = (mask.cumsum(1) == 0).sum(1)
    if padding is not None and padding.most:
        by_mask = mask is not None and not (mask.dim() == 2 and mask.all())
        by_places = mask is None and first is not None and not (first > length - pads).any()
        if not by_mask and not by_places:
            raise HeadsinkError(
                "attention_mask: the cache holds a batch padded on the left; give the mask of all cached and new tokens"
            )
    if (
        first is not None
        and positions is not None
        and positions.shape[1] > 1
        and ((first == 0) & (pads.to(first.device) < length)).any()
    ):
        raise HeadsinkError(
            f"the cache holds {length} tokens and the new ones begin at position 0 again: give the cached tokens followed by "
            "one new token or more"
        )


def _refusal(cache: Any) -> str:
    if type(cache) is DynamicCache and cache.get_seq_length():
        return (
            "this cache was filled without the plan (as prefix tuning does): start with headsink.new_cache(model, plan), or "
            "read the text with headsink.compress(model, plan, input_ids)"
        )
    what = "an offloaded DynamicCache" if type(cache) is DynamicCache else type(cache).__name__
    return f"{what} cannot hold a plan: use headsink.new_cache(model, plan) or leave the cache out"
