"""Log-probabilities of continuations on a cached prefix."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from headsink.attention.formats import KVDtype
from headsink.cache.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.models.distributed import input_device
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply_here, full_cache
from headsink.runtime.prefill import empty_cache, prefill

BLOCK = 32  # consecutive tokens that the bootstrap resamples together


def read(
    model: PreTrainedModel,
    plan: Plan | None,
    ids: Sequence[int],
    reconstruct: bool = False,
    kv_dtype: KVDtype = "auto",
) -> Cache:
    """The cache of a document under a plan, or the full cache, ready for continuations that are taken back.

    Each continuation is a segment, as a turn of a conversation. reconstruct, kv_dtype: as for `headsink.compress`.
    """
    quiet = plan if plan is None else plan.model_copy(update={"quality": ()})  # measured here, so nothing to warn of
    tokens = torch.tensor([list(ids)], device=input_device(model))
    cache = empty_cache(model, quiet, exact=False, kv_dtype=kv_dtype)
    prefill(model, quiet, tokens, cache=cache, reconstruct=reconstruct)
    if isinstance(cache, PlanCache) and cache.plan.positions == "absolute":
        cache.freeze()  # so that a continuation, which attends to every cached key, can be cropped
    cache.activate_past_recording()
    return cache


def continuation_log_probs(model: PreTrainedModel, cache: Cache, ids: Sequence[int], scored: int) -> Tensor:
    """Log-probabilities at the last `scored` tokens of a continuation, float32 [scored, vocabulary].

    Removes the continuation from the cache afterwards. Raises HeadsinkError unless 0 < scored < len(ids).
    """
    if not 0 < scored < len(ids):
        raise HeadsinkError(
            f"scored: {scored} tokens of a continuation of {len(ids)}, of which the first cannot be scored"
        )
    states = enumerate(cache.layers)  # of recurrent layers, which cannot be cropped
    before = {n: copy.deepcopy(layer) for n, layer in states if isinstance(layer, LinearAttentionCacheLayerMixin)}
    logits = forward(model, cache, ids, scored + 1)
    for number, layer in enumerate(cache.layers):
        if number in before:
            cache.layers[number] = before[number]
        else:
            layer.crop(-len(ids))
    return logits[:-1].float().log_softmax(-1)


def forward(model: PreTrainedModel, cache: Cache, ids: Sequence[int], keep: int) -> Tensor:
    """Append `ids` to the cache and return the logits of the last `keep` of them, [keep, vocabulary]."""
    tokens = torch.tensor([ids], device=input_device(model))
    with torch.no_grad(), apply_here(model, cache.plan) if isinstance(cache, PlanCache) else full_cache(model):
        return model(tokens, **cache_argument(cache), use_cache=True, logits_to_keep=keep).logits[0]
