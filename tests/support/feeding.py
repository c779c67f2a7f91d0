"""Feeding a tiny model in one call, in chunks or token by token, with padding or without."""

import torch

import headsink
from headsink.models.transformers_names import cache_argument

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def split(tokens, sizes, freeze=None):
    """Return the sizes of calls that feed `tokens` tokens in chunks of `sizes`; the last repeats, one begins at `freeze`."""
    sizes, calls = list(sizes), []
    while (begin := sum(calls)) < tokens:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        calls.append(min(size, tokens - begin, freeze - begin if freeze and begin < freeze else tokens))
    return calls


def feed(model, plan, ids, sizes, mask=None, freeze=None, **options):
    """Return the logits of `ids` fed in chunks of `sizes` (`split`), and the cache, frozen from a column on.

    The model runs every pass. options: of `headsink.new_cache`.
    """
    cache, parts, start = headsink.new_cache(model, plan, **options), [], 0
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        for size in split(ids.shape[1], sizes, freeze):
            if start == freeze:
                cache.freeze()
            end, given = start + size, {}
            if mask is not None:
                given["attention_mask"] = mask[:, :end]
                given["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
            parts.append(model(ids[:, start:end], **cache_argument(cache), **given).logits)
            start = end
    return torch.cat(parts, 1), cache


def padded(batch=3, length=61):
    ids = torch.randint(3, 211, (batch, length))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    mask[2, :1] = 0
    return ids, mask


WAYS = {"one pass": [1000], "chunks": [35, 5, 1, 9], "token by token": [1], "prefill then decode": [40, 1]}
