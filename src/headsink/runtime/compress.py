"""Prefill compression: evict from a KV cache once its prompt has been read in full."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from headsink.attention.interface import GAPS, left_padding
from headsink.cache.cache import PlanCache
from headsink.compression.reconstruction import reconstruct
from headsink.errors import HeadsinkError
from headsink.plan.plan import Plan
from headsink.runtime.apply import check_mask, new_cache


def compress(
    model: PreTrainedModel,
    plan: Plan,
    cache: Cache,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
) -> PlanCache:
    """A context that the model itself has read, cut once to what `plan` keeps; all that comes after stays.

    Reading takes the time and memory that it always takes, and memory grows with every later token, but the context is read
    without loss: of the same plan, this is the better and the slower way. Plans with `plan.prefill_compression` are made for
    it. With `plan.reconstruction_prompt` the model tells the context again, which takes longer than reading it did: keys are
    chosen by what that takes, and values make up for the keys that go (retelling.py).

    cache: transformers' `DynamicCache(config=model.config)`, filled; it is emptied. attention_mask: of the context, int [batch,
    tokens], 0 for left padding. input_ids: the context, int [batch, tokens], needed if the plan retells. Use what is returned
    inside `apply(model, plan)`. Raises HeadsinkError for another kind of cache, for input_ids that are missing, for a mask or
    input_ids of another shape than the cache, for right padding, and if the plan was made for another model.
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
    rows, tokens = cache.layers[0].keys.shape[0], cache.get_seq_length()  # type: ignore[union-attr]
    check_mask(attention_mask, rows, tokens)
    plan, padding, scores = compressed.plan, left_padding(attention_mask), None
    if padding is not None and padding.hidden is not None:
        raise HeadsinkError(GAPS)
    if plan.reconstruction_prompt:
        if input_ids is None or input_ids.shape != (rows, tokens):
            given = "missing" if input_ids is None else f"{list(input_ids.shape)}"
            raise HeadsinkError(
                f"input_ids: {given}; this plan tells the context again, the [{rows}, {tokens}] tokens of the cache"
            )
        scores = reconstruct(model, plan, cache, input_ids, None if padding is None else padding.tokens)
    compressed.fill(cache, padding, scores)
    compressed.freeze()
