"""A model under a plan, computed the slow way: one pass over the whole text, every head masked by the definition."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headsink import Plan
from headsink.pattern import reference_attention

_running: list[tuple[Plan, torch.Tensor | None]] = []


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    plan, padding = _running[-1]
    heads = plan.layers[module.layer_idx]
    if heads is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    patterns = [head.pattern for head in heads]
    output = reference_attention(query, key, value, patterns, plan.thresholds(module.layer_idx), scaling, padding)
    return output.transpose(1, 2), None


AttentionInterface.register("headsink_reference", _attention)
AttentionMaskInterface.register("headsink_reference", sdpa_mask)


@contextmanager
def masked(model: PreTrainedModel, plan: Plan, padding: torch.Tensor | None = None):
    before = model.config._attn_implementation
    model.set_attn_implementation("headsink_reference")
    _running.append((plan, padding))
    try:
        yield model
    finally:
        _running.pop()
        model.set_attn_implementation(before)


@torch.no_grad()
def reference_logits(model, plan, ids, attention_mask=None):
    """Logits [batch, tokens, vocabulary] of `model` under `plan`."""
    padding = None if attention_mask is None else attention_mask.int().argmax(1)
    position_ids = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
    with masked(model, plan, padding):
        return model(ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits
