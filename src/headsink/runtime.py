"""Run a model under a plan: `with apply(model, plan): model.generate(...)`.

Nothing of the model is replaced. Its attention goes through transformers' own interface (attention.py), and a plan lives in a
cache (cache.py). `apply` adds one forward hook that gives a new text a cache with the plan's shape; it acts in the
thread that entered it, as `torch.no_grad()` does, and a cache from `new_cache` keeps its own plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from headsink.architecture import Architecture, decoder
from headsink.attention import engaged, left_padding
from headsink.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.plan import Plan
from headsink.retelling import retell
from headsink.rotary import inverse_frequencies

_applied: ContextVar[dict[int, Plan]] = ContextVar("headsink_applied", default={})  # noqa: B039, never changed in place


def new_cache(model: PreTrainedModel, plan: Plan, exact: bool = True) -> PlanCache:
    """An empty KV cache that keeps what `plan` keeps. Use it inside `apply(model, ...)`.

    exact: in layers that keep everything attention is the very call that transformers makes, bit for bit; where logits are capped
    (Gemma 2) or sinks learned (gpt-oss), which `sdpa` cannot express, it differs by rounding. Without, it is what is soonest: on
    a CPU the kernels, which read and decode faster and differ by rounding. Raises HeadsinkError if the plan was made for another
    model.
    """
    return _cache(model, plan, plan.check(model), exact)


def _cache(model: PreTrainedModel, plan: Plan, shape: Architecture, exact: bool) -> PlanCache:
    inverse = inverse_frequencies(model) if plan.positions == "cache" else None
    return PlanCache(plan, model.config.get_text_config(decoder=True), shape.windows, inverse, exact)


def compress(
    model: PreTrainedModel,
    plan: Plan,
    cache: Cache,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
) -> PlanCache:
    """A context that the model itself has read, cut once to what `plan` keeps; all that comes after stays.

    Reading takes the time and memory that it always takes, and memory grows with every later token, but the context is read
    without loss: of the same plan, this is the better and the slower way. Plans with `plan.once` are made for it. With
    `plan.retell` the model tells the context again, which takes longer than reading it did: keys are chosen by what that
    takes, and values make up for the keys that go (retelling.py).

    cache: transformers' `DynamicCache(config=model.config)`, filled; it is emptied. attention_mask: of the context, int [batch,
    tokens], 0 for left padding. input_ids: the context, int [batch, tokens], needed if the plan retells. Use what is returned
    inside `apply(model, plan)`. Raises HeadsinkError for another kind of cache, for input_ids that are missing or of another
    length than the cache, and if the plan was made for another model.
    """
    if type(cache) is not DynamicCache:
        raise HeadsinkError(f"{type(cache).__name__} cannot be compressed: a DynamicCache can")
    if not cache.get_seq_length():
        raise HeadsinkError("this cache is empty: let the model read the context into it first")
    compressed = new_cache(model, plan)
    compress_into(compressed, model, cache, attention_mask, input_ids)
    return compressed


def compress_into(
    compressed: PlanCache,
    model: PreTrainedModel,
    cache: Cache,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
) -> None:
    """As `compress`, into an empty cache that is there already."""
    plan, padding, scores = compressed.plan, left_padding(attention_mask), None
    if plan.retell:
        if input_ids is None or input_ids.shape[1] != cache.get_seq_length():
            given = "missing" if input_ids is None else f"{input_ids.shape[1]} tokens"
            raise HeadsinkError(
                f"input_ids: {given}; this plan tells the context again, the {cache.get_seq_length()} tokens of the cache"
            )
        scores = retell(model, plan, cache, input_ids, None if padding is None else padding.tokens)
    compressed.fill(cache, padding, scores)
    compressed.hold()


@contextmanager
def apply(model: PreTrainedModel, plan: Plan, exact: bool = True) -> Iterator[PreTrainedModel]:
    """Inside the block, new texts run under `plan`: `generate`, or a plain forward pass.

    The cache is created with the plan's shape where none is given; exact: as for `new_cache`. A cache from there runs with its
    own plan.
    Acts on the calling thread only. Warns, once, when a text grows longer than those that the plan's quality was measured
    on. Raises HeadsinkError if the plan was made for another model, and for texts over the model's maximum, unless the plan
    counts positions in the cache.
    """
    shape = plan.check(model)
    warned = False

    def give_cache(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        nonlocal warned
        if _applied.get().get(id(model)) is not plan:
            return None
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, PlanCache):
            if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
                raise HeadsinkError(_refusal(cache))
            cache = _cache(model, plan, shape, exact)
        tokens = cache.get_seq_length() + _new_tokens(args, kwargs)
        cache.plan.check_length(tokens, shape.max_context)
        warned = warned or cache.plan.warn_beyond_verified(tokens)
        return args, {**kwargs, "past_key_values": cache}

    hook = decoder(model).register_forward_pre_hook(give_cache, with_kwargs=True)
    token = _applied.set({**_applied.get(), id(model): plan})
    try:
        with engaged(model):
            yield model
    finally:
        _applied.reset(token)
        hook.remove()


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens a row that a decoder is called with."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((int(tokens.shape[1]) for tokens in given if tokens is not None), 0)


def _refusal(cache: Cache) -> str:
    if type(cache) is DynamicCache:
        return "this cache was filled without the plan: start with headsink.new_cache(model, plan)"
    return f"{type(cache).__name__} cannot hold a plan: use headsink.new_cache(model, plan) or leave the cache out"
