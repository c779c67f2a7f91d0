"""Read a prompt into a cache under a plan."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from headsink.cache.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply, full_cache, new_cache
from headsink.runtime.compress import compress_into

CHUNK = 8192  # tokens of a prompt that are read at once: a streaming head never holds more than its window and these


def empty_cache(model: PreTrainedModel, plan: Plan | None, exact: bool = True) -> Cache:
    """A cache for the plan (`new_cache`), or transformers' own if there is none."""
    if plan is None:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    return new_cache(model, plan, exact)


def read_long(model: PreTrainedModel, cache: Cache, text: Tensor) -> None:
    """Read a long prompt in pieces, but for the last one. transformers' own `prefill_chunk_size` forgets what a cache holds."""
    with torch.no_grad():
        for part in text[:, cache.get_seq_length() :].split(CHUNK, 1)[:-1]:
            model(part, **cache_argument(cache), use_cache=True, logits_to_keep=1)


def read_prompt(model: PreTrainedModel, cache: PlanCache, text: Tensor) -> None:
    """Read in full, and compress once, what comes before the last token of the prompt, which `generate` begins with."""
    if not text.shape[1]:
        cache.freeze()
        return
    full = empty_cache(model, None)
    with torch.no_grad(), full_cache(model):
        model(text, **cache_argument(full), use_cache=True, logits_to_keep=1)
    compress_into(cache, model, full, input_ids=text)


def read(model: PreTrainedModel, plan: Plan, ids: list[int]) -> PlanCache:
    """What a plan keeps of a text, with all of its tokens read. Raises HeadsinkError if it does not fit the model."""
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    if len(ids) > longest and plan.positions == "absolute":
        raise HeadsinkError(f"prompt: {len(ids)} tokens are over the model's maximum of {longest}")
    cache, text = new_cache(model, plan), torch.tensor([ids], device=model.device)
    if plan.prefill_compression:
        read_prompt(model, cache, text)
        return cache
    with torch.no_grad(), apply(model, plan):
        model(text, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return cache
