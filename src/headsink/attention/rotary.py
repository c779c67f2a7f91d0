"""How the layers of a model rotate queries by position, found by two passes over one token.

A single token attends to itself only, so its hidden states do not depend on its position, unless positions are added to the
embeddings. So the queries of a layer at two positions tell whether rotary embedding relates them (models/rope.py), whether the
layer has no positions, or neither. Prompt scores (eviction/scorers/prompt.py), refitting and cache-relative positions need this.
"""

from __future__ import annotations

import inspect
import weakref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headsink.attention.interface import AttentionRecord, observe_attention
from headsink.errors import HeadsinkError
from headsink.models.distributed import input_device
from headsink.models.rope import Rotary, inverse_frequencies, rotate
from headsink.models.spec import describe, unwrap, vocabulary

FIRST, DISTANCE = 3, 7  # the first position, and tokens from there to the second
CLOSE = 0.02  # relative difference of queries that are the same up to rounding in bfloat16

_found: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Rotary | None, ...]] = weakref.WeakKeyDictionary()


def layer_rotations(model: nn.Module) -> tuple[Rotary | None, ...]:
    """Return how each layer rotates queries.

    None for layers without attention, and for those that encode positions in another way or depend on the length of the text.
    """
    inside = unwrap(model)
    found = _found.get(inside)
    if found is None:
        found = _measure(inside)
        if not inside.training:  # dropout would disturb the queries
            _found[inside] = found
    return found


@torch.no_grad()
def _measure(model: PreTrainedModel) -> tuple[Rotary | None, ...]:
    shape, rotations = describe(model), list[Rotary | None]()
    if not shape.prefix_free or "position_ids" not in inspect.signature(model.forward).parameters:
        return (None,) * shape.layers
    try:
        before, after = (_queries(model, position) for position in (FIRST, FIRST + DISTANCE))
    except HeadsinkError:  # a patched or compiled model; its first pass under a plan says why
        return (None,) * shape.layers
    for layer, kind in enumerate(shape.kinds):
        found = None
        if layer in before and layer in after:
            size, candidates = after[layer].norm().clamp(min=1e-12), _candidates(model, kind, before[layer].shape[-1])
            errors = [float((rotate(before[layer], DISTANCE, own) - after[layer]).norm() / size) for own in candidates]
            found = candidates[errors.index(min(errors))] if min(errors) < CLOSE else None
        rotations.append(found)
    return tuple(rotations)


def _candidates(model: PreTrainedModel, kind: str, dim: int) -> list[Rotary]:
    """How a layer of a kind may rotate queries of `dim` coordinates."""
    inverse, found = inverse_frequencies(model, kind), [Rotary(torch.zeros(dim // 2, device=input_device(model)))]
    if inverse is not None and 2 * len(inverse) <= dim:
        found += [Rotary(inverse), Rotary(-inverse), Rotary(inverse, interleaved=True)]
    return found


def _queries(model: PreTrainedModel, position: int) -> dict[int, Tensor]:
    """Return the queries of one token at a position, of every layer with attention: float32 [1, heads, 1, dim]."""
    queries: dict[int, Tensor] = {}

    def keep(record: AttentionRecord) -> None:
        queries[record.layer] = record.query.float()

    token = torch.full((1, 1), vocabulary(model) // 2, device=input_device(model))
    required = [layer for layer, planned in enumerate(describe(model).planned) if planned]
    with observe_attention(model, keep, required):
        model(input_ids=token, position_ids=torch.full_like(token, position), use_cache=False)
    return queries
