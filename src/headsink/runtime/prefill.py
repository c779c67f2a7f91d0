"""Prefill: the one place where the KV cache of a prompt under a plan is made."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from headsink.attention.formats import KVDtype
from headsink.attention.interface import left_padding
from headsink.cache.cache import PlanCache
from headsink.compression.reconstruction import reconstruct as reconstruct_context
from headsink.errors import HeadsinkError
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply_here, full_cache, new_cache

CHUNK = 8192  # tokens per forward pass where keys are evicted while they are read: bounds the memory of the pass


def empty_cache(model: PreTrainedModel, plan: Plan | None, exact: bool = True, *, kv_dtype: KVDtype = "auto") -> Cache:
    """A cache for the plan (`new_cache`), or transformers' own if there is none."""
    if plan is None:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    return new_cache(model, plan, exact, kv_dtype=kv_dtype)


def prefill(
    model: PreTrainedModel,
    plan: Plan | None,
    ids: Tensor,
    *,
    exact: bool = True,
    mask: Tensor | None = None,
    cache: Cache | None = None,
    reconstruct: bool = False,
) -> Cache:
    """Read prompts into a KV cache and evict as the plan says. Without a plan the cache is full.

    ids: int64 [batch, tokens]; they may be empty. mask: int [batch, tokens], 0 for left padding. exact: as for `new_cache`.
    cache: an empty one of the same plan to read into. reconstruct: as for `compress`. Raises HeadsinkError for prompts that are
    longer than the model's maximum, if the plan does not count positions in the cache.
    """
    longest = describe(model).max_context
    if ids.shape[1] > longest and (plan is None or plan.positions == "absolute"):
        raise HeadsinkError(f"prompt: {ids.shape[1]} tokens are over the model's maximum of {longest}")
    cache = empty_cache(model, plan, exact) if cache is None else cache
    if not ids.shape[1]:
        return cache
    if reconstruct and isinstance(cache, PlanCache):
        _read_with_reconstruction(model, cache, ids, mask)
    else:
        _read(model, cache, ids, mask)
    return cache


def _read(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None) -> None:
    """Read texts into an empty cache, in one forward pass; in chunks where keys are evicted while they are read.

    ids: int64 [batch, tokens]; mask: int [batch, tokens], 0 for left padding.
    """
    planned = isinstance(cache, PlanCache)
    scope = apply_here(model, cache.plan) if planned else full_cache(model)
    chunks = planned and not cache.prefill.dense and not describe(model).recurrent
    chunk = CHUNK if chunks else ids.shape[1]
    begin = 0
    with torch.no_grad(), scope:
        for part in ids.split(chunk, 1):
            end, given = begin + part.shape[1], {}
            if mask is not None:
                positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)
                given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:]}
            model(part, **cache_argument(cache), use_cache=True, logits_to_keep=1, **given)
            begin = end


def _read_with_reconstruction(model: PreTrainedModel, cache: PlanCache, ids: Tensor, mask: Tensor | None) -> None:
    """Read texts with the full cache, choose keys by context reconstruction, and move them into an empty cache of a plan."""
    if cache.plan.positions == "cache-relative":
        raise HeadsinkError("reconstruct: it needs 'absolute' positions")
    describe(model).refuse("reconstruct", "chunked_attention")
    full, padding = empty_cache(model, None), left_padding(mask)
    _read(model, full, ids, mask)
    scores = reconstruct_context(model, cache.plan, full, ids, None if padding is None else padding.tokens)
    cache.fill(full, padding, scores)


def prefill_chunks(model: PreTrainedModel, cache: Cache, ids: Tensor) -> None:
    """Read what a cache does not hold yet of a long prompt, in chunks, but for the last chunk, which `generate` reads.

    Only where keys are evicted while they are read: chunks end segments of dense prefill. transformers' own
    `prefill_chunk_size` forgets what a cache holds.
    """
    if (isinstance(cache, PlanCache) and cache.prefill.dense) or describe(model).recurrent:
        return
    with torch.no_grad():
        for part in ids[:, cache.get_seq_length() :].split(CHUNK, 1)[:-1]:
            model(part, **cache_argument(cache), use_cache=True, logits_to_keep=1)
