"""Which tokens of a prompt every KV head keeps under a plan, read out of the KV cache that the prompt leaves.

The prompt is read as everywhere else (runtime/prefill.py). A cache does not record which tokens its keys belong to, so cached
keys are found again among all keys of the same pass, which the cache stores unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.cache.cache import PlanCache
from headsink.cache.layer import PlanLayer
from headsink.models.distributed import input_device
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.runtime.apply import new_cache
from headsink.runtime.prefill import prefill


def kept_tokens(model: PreTrainedModel, plan: Plan, ids: Sequence[int]) -> Tensor:
    """Tokens whose keys are cached after a prompt: bool [layers with attention, KV heads, tokens], on the CPU.

    A synthetic key, which stands for evicted ones (eviction/refitting.py), belongs to no token. Tokens with the same key in a
    head count as one, which happens without rotary embeddings. A layer with fewer KV heads than others repeats its own, as in a
    census. Raises HeadsinkError if the plan was made for another model, and for prompts over the model's maximum.
    """
    shape, cache = describe(model), new_cache(model, plan)
    keys: dict[int, list[Tensor]] = {}

    def update(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **more: Any) -> Any:
        keys.setdefault(layer_idx, []).append(key)
        return PlanCache.update(cache, key, value, layer_idx, *args, **more)

    cache.update = update  # type: ignore[method-assign]
    prefill(model, plan, torch.tensor([list(ids)], device=input_device(model)), cache=cache)
    kept = {}
    for number, parts in keys.items():
        names, layer = _names(torch.cat(parts, 2)[0]), cache.layers[number]
        kept[number] = torch.ones_like(names, dtype=torch.bool)
        for group in layer.groups if isinstance(layer, PlanLayer) else ():
            for own, visible, head in zip(_names(group.keys[0]), group.visible[0], group.heads, strict=True):
                kept[number][head] = torch.isin(names[head], own[visible])
    most = max(len(flags) for flags in kept.values())
    flags = [kept[shape.source(layer)] for layer in shape.attending]
    return torch.stack([own.repeat_interleave(most // len(own), 0) for own in flags]).cpu()


def _names(keys: Tensor) -> Tensor:
    """A number for each key that depends on all of its bits: [heads, keys, dim] -> int64 [heads, keys]."""
    bits = keys.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[keys.element_size()])
    factors = torch.randint(2**62, (keys.shape[2],), generator=torch.Generator().manual_seed(0))
    return (bits.long() * (2 * factors + 1).to(keys.device)).sum(-1)  # overflow wraps
