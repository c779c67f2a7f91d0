"""Feeding a tiny model in one call, in chunks or token by token, with padding or without."""

import torch

import headsink
from headsink.models.transformers_names import cache_argument

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def feed(model, plan, ids, sizes, mask=None, freeze=None, exact=True):
    """Return the logits of `ids` fed in chunks of `sizes` (the last size repeats), frozen from a column on."""
    cache, parts, start = headsink.new_cache(model, plan, exact), [], 0
    sizes = list(sizes)
    with headsink.apply(model, plan), torch.no_grad():
        while start < ids.shape[1]:
            end = min(start + (sizes.pop(0) if len(sizes) > 1 else sizes[0]), ids.shape[1])
            if start == freeze:
                cache.freeze()
            elif freeze is not None and start < freeze:
                end = min(end, freeze)
            options = {}
            if mask is not None:
                options["attention_mask"] = mask[:, :end]
                options["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
            parts.append(model(ids[:, start:end], **cache_argument(cache), **options).logits)
            start = end
    return torch.cat(parts, 1), cache


def padded(batch=3, length=61):
    ids = torch.randint(3, 211, (batch, length))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    mask[2, :1] = 0
    return ids, mask


WAYS = {"one pass": [1000], "chunks": [17, 5, 1, 9], "token by token": [1], "prefill then decode": [40, 1]}
