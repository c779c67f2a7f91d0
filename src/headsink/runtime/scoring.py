"""Log-probabilities of continuations on a cached prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from headsink.cache.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply_here, full_cache, new_cache
from headsink.runtime.compress import compress

BLOCK = 32  # consecutive tokens that the bootstrap resamples together


def read(model: PreTrainedModel, plan: Plan | None, ids: Sequence[int]) -> Cache:
    """The cache of a document, read by the model itself or under a plan, ready for branches that are taken back."""
    cache: Cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if plan is not None:
        plan = plan.model_copy(update={"quality": ()})  # measured here, so nothing to warn of
        if not plan.prefill_compression:
            cache = new_cache(model, plan)
    forward(model, cache, ids, 1)
    if plan is not None and plan.prefill_compression:
        cache = compress(model, plan, cache, input_ids=torch.tensor([list(ids)], device=model.device))
    cache.activate_past_recording()
    return cache


def branch_log_probs(model: PreTrainedModel, cache: Cache, ids: Sequence[int], scored: int) -> Tensor:
    """Log-probabilities at the last `scored` tokens of a continuation, float32 [scored, vocabulary].

    Removes the continuation from the cache afterwards. Raises HeadsinkError unless 0 < scored < len(ids).
    """
    if not 0 < scored < len(ids):
        raise HeadsinkError(
            f"scored: {scored} tokens of a continuation of {len(ids)}, of which the first cannot be scored"
        )
    logits = forward(model, cache, ids, scored + 1)
    cache.crop(-len(ids))
    return logits[:-1].float().log_softmax(-1)


def forward(model: PreTrainedModel, cache: Cache, ids: Sequence[int], keep: int) -> Tensor:
    """Append `ids` to the cache and return the logits of the last `keep` of them, [keep, vocabulary]."""
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad(), apply_here(model, cache.plan) if isinstance(cache, PlanCache) else full_cache(model):
        return model(tokens, **cache_argument(cache), use_cache=True, logits_to_keep=keep).logits[0]
