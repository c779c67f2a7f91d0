"""Prefill: the one place where the KV cache of a prompt under a plan is made."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from headsink.cache.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply_here, full_cache, new_cache
from headsink.runtime.compress import compress_into

CHUNK = (
    8192  # tokens per forward pass under online eviction: a streaming head never holds more than its window and these
)


def empty_cache(model: PreTrainedModel, plan: Plan | None, exact: bool = True) -> Cache:
    """A cache for the plan (`new_cache`), or transformers' own if there is none."""
    if plan is None:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    return new_cache(model, plan, exact)


def prefill(
    model: PreTrainedModel, plan: Plan | None, ids: Tensor, *, exact: bool = True, cache: Cache | None = None
) -> Cache:
    """Read prompts into a KV cache and evict as the plan says.

    With `plan.prefill_compression` the prompts are read with the full cache and compressed after that; otherwise keys are
    evicted while they are read. Without a plan the cache is full.

    ids: int64 [batch, tokens], without padding; they may be empty. exact: as for `new_cache`. cache: an empty one of the
    same plan to read into. Raises HeadsinkError for prompts that are longer than the model's maximum, if the plan does not count
    positions in the cache.
    """
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    if ids.shape[1] > longest and (plan is None or plan.positions == "absolute"):
        raise HeadsinkError(f"prompt: {ids.shape[1]} tokens are over the model's maximum of {longest}")
    cache = empty_cache(model, plan, exact) if cache is None else cache
    if isinstance(cache, PlanCache) and plan is not None and plan.prefill_compression:
        if ids.shape[1]:
            full = empty_cache(model, None)
            _read(model, None, full, ids, ids.shape[1])
            compress_into(cache, model, full, input_ids=ids)
        else:
            cache.freeze()
    elif ids.shape[1]:
        _read(model, plan, cache, ids, ids.shape[1] if plan is None else CHUNK)
    return cache


def prefill_chunks(model: PreTrainedModel, cache: Cache, ids: Tensor) -> None:
    """Read what a cache does not hold yet of a long prompt, in chunks, but for the last chunk, which `generate` reads.

    transformers' own `prefill_chunk_size` forgets what a cache holds.
    """
    with torch.no_grad():
        for part in ids[:, cache.get_seq_length() :].split(CHUNK, 1)[:-1]:
            model(part, **cache_argument(cache), use_cache=True, logits_to_keep=1)


def _read(model: PreTrainedModel, plan: Plan | None, cache: Cache, ids: Tensor, chunk: int) -> None:
    with torch.no_grad(), full_cache(model) if plan is None else apply_here(model, plan):
        for part in ids.split(chunk, 1):
            model(part, **cache_argument(cache), use_cache=True, logits_to_keep=1)
