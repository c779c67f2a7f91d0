"""Reference for a model under a plan: one pass over the whole text, with every head masked by the definition."""

import sys
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from headsink import Plan
from headsink.attention.reference import masked_attention, reference_attention
from headsink.eviction.pattern import FULL, visible
from headsink.eviction.scorers import LINEAR, SCORERS

_running: list[tuple[Plan, torch.Tensor | None, int | None, bool]] = []


def frozen_attention(
    query,
    key,
    value,
    patterns,
    weights,
    scaling,
    padding,
    freeze,
    prefill_compression=False,
    softcap=None,
    sink_logits=None,
    scorer=LINEAR,
):
    """Reference attention without eviction from column `freeze` on: later queries see the keys kept at it and all since.

    prefill_compression: queries before `freeze` have full attention, as in a context that is compressed after prefill.
    """
    head = [t[:, :, :freeze] for t in (query, key, value)]
    reading = [FULL] * len(patterns) if prefill_compression else patterns
    before = reference_attention(*head, reading, weights, scaling, padding, softcap, sink_logits, scorer)
    columns, scores = torch.arange(key.shape[2]), scorer.scores(key, value, weights)
    positions = columns - (torch.zeros(len(key), dtype=torch.long) if padding is None else padding)[:, None]
    since = (columns[freeze:] <= columns[freeze:, None]) & (positions[:, None, freeze:] >= 0)
    output, group = torch.empty_like(query[:, :, freeze:]), query.shape[1] // key.shape[1]
    for n, pattern in enumerate(patterns):
        held = since.new_zeros(len(key), 1, 0)
        if freeze:
            held = visible(pattern, positions[:, freeze - 1 : freeze], positions[:, :freeze], scores[:, n, :freeze])
        mask = torch.cat([held.expand(*since.shape[:2], freeze), since], -1)[:, None]
        rows = slice(n * group, (n + 1) * group)
        given = query[:, rows, freeze:], key[:, n : n + 1], value[:, n : n + 1], mask
        output[:, rows] = masked_attention(*given, scaling, softcap, None if sink_logits is None else sink_logits[rows])
    return torch.cat([before, output], 2)


def own_attention(module, query, key, value, mask, **kwargs):
    """The layer's attention by transformers' implementation. mask: float, as `eager_mask` makes it."""
    plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    attend = sdpa_attention_forward if plain else sys.modules[type(module).__module__].eager_attention_forward
    return attend(
        module, query, key, value, mask.clamp(min=torch.finfo(torch.float32).min), **kwargs
    )  # Gemma 2 rounds to it


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    plan, padding, freeze, prefill_compression = _running[-1]
    heads = plan.layers[module.layer_idx]
    if heads is None:
        return own_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    patterns = [head.pattern for head in heads]
    given = query, key, value, patterns, plan.scores(module.layer_idx), scaling, padding
    more = {"softcap": kwargs.get("softcap"), "sink_logits": kwargs.get("s_aux"), "scorer": SCORERS[plan.scorer]}
    output = (
        reference_attention(*given, **more)
        if freeze is None
        else frozen_attention(*given, freeze, prefill_compression, **more)
    )
    return output.transpose(1, 2), None


AttentionInterface.register("headsink_reference", _attention)
AttentionMaskInterface.register("headsink_reference", eager_mask)


@contextmanager
def masked(
    model: PreTrainedModel,
    plan: Plan,
    padding: torch.Tensor | None = None,
    freeze: int | None = None,
    prefill_compression=False,
):
    before = model.config._attn_implementation
    model.set_attn_implementation("headsink_reference")
    _running.append((plan, padding, freeze, prefill_compression))
    try:
        yield model
    finally:
        _running.pop()
        model.set_attn_implementation(before)


@torch.no_grad()
def reference_logits(model, plan, ids, attention_mask=None, freeze=None, prefill_compression=False):
    """Return the logits [batch, tokens, vocabulary] of `model` under `plan`.

    freeze: the column from which on nothing is evicted. prefill_compression: the columns before it are read in full attention
    (headsink.compress).
    """
    padding = None if attention_mask is None else attention_mask.int().argmax(1)
    position_ids = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
    with masked(model, plan, padding, freeze, prefill_compression):
        return model(ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits
