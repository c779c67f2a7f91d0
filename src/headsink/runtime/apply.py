"""Run a model under a plan: `with apply(model, plan): model.generate(...)`.

Nothing of the model is replaced. Its attention goes through transformers' own interface (attention.py), and a plan lives in a
cache (cache.py). Inside `apply` every new text gets a cache with the plan's shape, in every thread (passes.py); a cache from
`new_cache` keeps its own plan.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from headsink.attention.passes import scoped
from headsink.cache.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.models.rope import inverse_frequencies
from headsink.models.spec import Architecture, decoder, unwrapped
from headsink.models.transformers_names import assists, given_cache
from headsink.plan.plan import Plan


def new_cache(model: PreTrainedModel, plan: Plan, exact: bool = True) -> PlanCache:
    """An empty KV cache that keeps what `plan` keeps. Use it inside `apply(model, ...)`.

    exact: in layers that keep everything attention is the very call that transformers makes, bit for bit; where logits are capped
    (Gemma 2) or sinks learned (gpt-oss), which `sdpa` cannot express, it differs by rounding. Without, it is what is soonest: on
    a CPU the kernels, which read and decode faster and differ by rounding. Raises HeadsinkError if the plan was made for another
    model.
    """
    return _cache(model, plan, plan.check(model), exact)


def _cache(model: PreTrainedModel, plan: Plan, shape: Architecture, exact: bool) -> PlanCache:
    inverse = inverse_frequencies(model) if plan.positions == "cache-relative" else None
    cache = PlanCache(plan, shape.windows, inverse, exact)
    cache.model = weakref.ref(unwrapped(model))
    return cache


def check_mask(mask: Tensor | None, rows: int, tokens: int, columns: int | None = None) -> None:
    """Raise unless a mask is of so many texts and tokens, and pads on the left. columns: of a mask of ones that is gone."""
    found = (rows if mask is None else len(mask), mask.shape[1] if mask is not None else columns or tokens)
    if found != (rows, tokens):
        raise HeadsinkError(f"attention_mask: its shape is {list(found)} and must be [{rows}, {tokens}]")
    if mask is not None and not mask[:, -1].all():
        raise HeadsinkError("attention_mask: it pads on the right; pad on the left (tokenizer.padding_side = 'left')")


@contextmanager
def apply(model: PreTrainedModel, plan: Plan, exact: bool = True) -> Iterator[PreTrainedModel]:
    """Inside the block, new texts run under `plan`: `generate`, or a plain forward pass, in every thread.

    The cache is created with the plan's shape where none is given; an empty `DynamicCache` that is given becomes one. A
    cache from `new_cache` runs with its own plan. A thread that enters a block of its own has that one's plan. exact: as for
    `new_cache`.

    Warns, once, when a text grows longer than those that the plan's quality was measured on, and when a plan that was made
    for prefill compression (`headsink.compress`) evicts while it reads. Raises HeadsinkError if the plan was made for
    another model, and inside the block: for texts over the model's maximum, unless the plan counts positions in the cache;
    for calls that a plan cannot hold for; and where a layer attended without the plan.
    """
    with scoped(model, plan, _Texts(model, plan, exact).prepare):
        yield model


@contextmanager
def apply_here(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """As `apply`, but for calls from the block only: other threads go on with what is applied to the model elsewhere."""
    with scoped(model, plan, _Texts(model, plan, True).prepare, private=True):
        yield


@contextmanager
def full_cache(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside the block the model runs with the full cache, whatever is applied outside of it. For calls from the block only."""
    with scoped(model, None, None, private=True):
        yield model


class _Texts:
    """What comes through a model in an `apply` block: makes and checks the caches."""

    def __init__(self, model: PreTrainedModel, plan: Plan, exact: bool):
        self.model, self.plan, self.shape, self.exact = model, plan, plan.check(model), exact
        self.warned: set[str] = set()

    def prepare(self, given: dict[str, Any], kept: bool) -> PlanCache:
        """The cache of a pass, given its arguments. kept: whether the caller wants it back. Raises HeadsinkError for what
        cannot run under a plan."""
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if tokens is None or not tokens.shape[1]:
            raise HeadsinkError("the model was called without tokens; give input_ids or inputs_embeds with one or more")
        if given.get("token_type_ids") is not None and not given["token_type_ids"].any():
            given["token_type_ids"] = (
                None  # of a prompt without images (Gemma 3), for which the model would build a mask
            )
        cache = given_cache(given)
        _refuse(decoder(self.model), given, kept)
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
        places = given.get("position_ids")
        if places is not None and places.shape[-1] not in (1, count):
            raise HeadsinkError(f"position_ids: {list(places.shape)} do not fit {rows} texts of {count} new tokens")
        if cache.rows == 1 and rows > 1:
            cache.batch_repeat_interleave(rows)
        elif cache.rows not in (0, rows):
            raise HeadsinkError(
                f"this cache holds {cache.rows} texts and the model was given {rows}; give as many, or a cache of "
                "one text, which is repeated"
            )
        _check_columns(given, cache)
        length = cache.get_seq_length() + count
        cache.plan.check_length(length, self.shape.max_context)
        if "length" not in self.warned and cache.plan.warn_beyond_verified(length):
            self.warned.add("length")
        evicts = cache.plan.prefill_compression and not cache.held and not cache.get_seq_length() and count > 1
        if evicts and "once" not in self.warned:
            self.warned.add("once")
            warnings.warn(
                "this plan was made for prefill compression: read the prompt with the full cache and call "
                "headsink.compress(model, plan, cache), as `headsink generate` does. Here it evicts while it reads, "
                "which costs more quality",
                stacklevel=2,
            )
        return cache

    def _owns(self, cache: PlanCache) -> bool:
        """Whether a cache was made for this model, or for one with the weights that this plan is for."""
        made_here = cache.model is not None and cache.model() is unwrapped(self.model)
        return made_here or cache.plan is self.plan or cache.plan.model == self.plan.model

    def _new(self) -> PlanCache:
        return _cache(self.model, self.plan, self.shape, self.exact)

    def _adopt(self, cache: DynamicCache) -> None:
        """Make an empty cache of transformers the plan's, so that whoever holds it finds the text in it."""
        records = any(getattr(layer, "record_past", False) for layer in cache.layers) or assists()
        cache.__class__ = PlanCache
        cache.__dict__.update(self._new().__dict__)
        if records:
            cache.activate_past_recording()


def _refuse(stack: Any, given: dict[str, Any], kept: bool) -> None:
    """Raise for arguments that mean nothing under a plan."""
    if getattr(stack, "gradient_checkpointing", False) and stack.training and torch.is_grad_enabled():
        raise HeadsinkError(
            "gradient checkpointing drops the KV cache, and the plan with it: call "
            "model.gradient_checkpointing_disable(), or model.eval()"
        )
    places = given.get("position_ids")
    if (
        not kept
        and given.get("attention_mask") is None
        and places is not None
        and places.dim() == 2
        and (places.diff(dim=1) != 1).any()
    ):
        raise HeadsinkError(
            "position_ids start again within a row, as packed documents do; a plan takes one document a row, padded on the left"
        )


def _check_columns(given: dict[str, Any], cache: PlanCache) -> None:
    """Raise unless mask and positions of new tokens say that they come after what the cache holds."""
    length, padding = cache.get_seq_length(), cache.padding
    mask, places = given.get("attention_mask"), given.get("position_ids")
    first = places[:, 0] if places is not None and places.dim() == 2 else None
    if not length or cache.on_card:  # a step of our own on a GPU gives true positions, and must not wait for the card
        return
    pads = torch.zeros(1, dtype=torch.int64) if padding is None else padding.tokens
    if padding is None and mask is not None and mask.dim() == 2:  # no layer is planned that would know of the padding
        pads = (mask.cumsum(1) == 0).sum(1)
    if padding is not None and padding.most:
        by_mask = mask is not None and not (mask.dim() == 2 and mask.all())
        by_places = mask is None and first is not None and not (first > length - pads).any()
        if not by_mask and not by_places:
            raise HeadsinkError(
                "attention_mask: the cache holds a batch padded on the left; give the mask of all its tokens and the new ones"
            )
    if (
        first is not None
        and places is not None
        and places.shape[1] > 1
        and ((first == 0) & (pads.to(first.device) < length)).any()
    ):
        raise HeadsinkError(
            f"the cache holds {length} tokens and the new ones begin at position 0 again: give the text with one token or more "
            "after those"
        )


def _refusal(cache: Any) -> str:
    if type(cache) is DynamicCache and cache.get_seq_length():
        return (
            "this cache was filled without the plan (prefix tuning does so too): compress it with "
            "headsink.compress(model, plan, cache), or start with headsink.new_cache(model, plan)"
        )
    what = "an offloaded DynamicCache" if type(cache) is DynamicCache else type(cache).__name__
    return f"{what} cannot hold a plan: use headsink.new_cache(model, plan) or leave the cache out"
