"""Reference for a model under a plan: one pass over the whole text, with every head masked by the definition."""

import sys
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from headsink import Plan
from headsink.attention.formats import decode, encode
from headsink.attention.reference import reference_attention
from headsink.attention.rotary import layer_rotations
from headsink.eviction.scorers import SCORERS

_running: list[
    tuple[Plan, torch.Tensor | None, list[int] | int | None, tuple[torch.Tensor | None, ...], int | None, bool]
] = []
# By the id of keys, which are kept alive: the layer that computed them and its queries. Layers of Gemma 3n share keys.
_owners: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}


def own_attention(module, query, key, value, mask, **kwargs):
    """The layer's attention by transformers' implementation. mask: float, as `eager_mask` makes it."""
    plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    attend = sdpa_attention_forward if plain else sys.modules[type(module).__module__].eager_attention_forward
    return attend(
        module, query, key, value, mask.clamp(min=torch.finfo(torch.float32).min), **kwargs
    )  # Gemma 2 rounds to it


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    plan, padding, segments, rotations, freeze, kv_dtype = _running[-1]
    tokens = key.shape[2]
    if isinstance(segments, int):
        segments = [min(segments, tokens)] + [1] * (tokens - segments)
    layer, scoring, _ = _owners.setdefault(id(key), (module.layer_idx, query, key))
    heads = plan.layers[layer]
    if heads is None:
        key, value = decode(kv_dtype, *encode(kv_dtype, key, value), key.dtype)
        return own_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    patterns = [head.pattern for head in heads]
    output = reference_attention(
        query,
        key,
        value,
        patterns,
        plan.scores(layer),
        scaling,
        padding,
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
        SCORERS[plan.scorer],
        segments,
        rotations[layer],
        freeze,
        plan.decode_window,
        scoring,
        kv_dtype,
    )
    return output.transpose(1, 2), None


AttentionInterface.register("headsink_reference", _attention)
AttentionMaskInterface.register("headsink_reference", eager_mask)


@contextmanager
def masked(
    model: PreTrainedModel, plan: Plan, padding: torch.Tensor | None = None, segments=None, freeze=None, kv_dtype="auto"
):
    before, rotations = model.config._attn_implementation, layer_rotations(model)
    model.set_attn_implementation("headsink_reference")
    _running.append((plan, padding, segments, rotations, freeze, kv_dtype))
    try:
        yield model
    finally:
        _running.pop()
        _owners.clear()
        model.set_attn_implementation(before)


@torch.no_grad()
def reference_logits(model, plan, ids, attention_mask=None, segments=None, freeze=None, kv_dtype="auto"):
    """Return the logits [batch, tokens, vocabulary] of `model` under `plan`.

    segments: tokens of each segment; a number: those of the prompt, after which every token is one; None: the whole text is one
    segment. freeze: the column from which on nothing is
    evicted; a segment begins there. kv_dtype: of cached keys and values.
    """
    padding = None if attention_mask is None else attention_mask.int().argmax(1)
    position_ids = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
    with masked(model, plan, padding, ids.shape[1] if segments is None else segments, freeze, kv_dtype):
        return model(ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits
