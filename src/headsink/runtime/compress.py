"""Prefill compression: evict from a KV cache once, after a prefill with full attention."""

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
    """Evict from a filled full cache all keys that `plan` does not keep. Later tokens are not evicted.

    The prefill takes the time and memory of full attention, and memory grows with every later token. Nothing is lost while the
    context is read, so the same plan has better quality than with online eviction. Plans with `plan.prefill_compression` are
    calibrated for it. With `plan.reconstruction_prompt`, importance scores come from context reconstruction
    (compression/reconstruction.py), which takes longer than the prefill; with `plan.refit_values` the kept values are refitted.

    cache: transformers' `DynamicCache(config=model.config)`, filled; it is emptied. attention_mask: of the context, int [batch,
    tokens], 0 for left padding. input_ids: the context, int [batch, tokens], needed for context reconstruction. Use the returned
    cache inside `apply(model, plan)`. Raises HeadsinkError for another type of cache, for missing input_ids, for a mask or
    input_ids of another shape than the cache, for right padding, and if the plan was made for another model.
    """
    if type(cache) is not DynamicCache:
        raise HeadsinkError(f"{type(cache).__name__} cannot be compressed; give a DynamicCache")
    if not cache.get_seq_length():
        raise HeadsinkError("this cache is empty: prefill it with the context first")
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
    """As `compress`, into an existing empty cache."""
    rows, tokens = cache.layers[0].keys.shape[0], cache.get_seq_length()  # type: ignore[union-attr]
    check_mask(attention_mask, rows, tokens)
    plan, padding, scores = compressed.plan, left_padding(attention_mask), None
    if padding is not None and padding.hidden is not None:
        raise HeadsinkError(GAPS)
    if plan.reconstruction_prompt:
        if input_ids is None or input_ids.shape != (rows, tokens):
            given = "missing" if input_ids is None else f"{list(input_ids.shape)}"
            raise HeadsinkError(
                f"input_ids: {given}; this plan reconstructs the context, the [{rows}, {tokens}] tokens of the cache"
            )
        scores = reconstruct(model, plan, cache, input_ids, None if padding is None else padding.tokens)
    compressed.fill(cache, padding, scores)
    compressed.freeze()
