"""Cache-relative rotary positions, `positions="cache-relative"`, for streaming generation (StreamingLLM, arXiv 2309.17453).

Cached keys are already rotated by their absolute position, and attention depends only on the distance of query and key. For the
last w tokens this distance is the same in the text and in a cache of s + w keys. Only the distance to the s sink tokens differs:
a query at position s + w or later attends to them from position s + w - 1, the last of the cache. Such a query is rotated back
to that position for the sink tokens only. Thus no distance exceeds s + w, for texts of any length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headsink.errors import HeadsinkError
from headsink.models.families import ROTARY_HALVES
from headsink.models.spec import decoder, describe, unwrap


def inverse_frequencies(model: nn.Module) -> Tensor:
    """Return the inverse frequencies of a full-attention layer, radians per position of each rotary pair: float32 [pairs].

    Raises HeadsinkError if the model does not support cache-relative positions.
    """
    kind, shape = unwrap(model).config.get_text_config(decoder=True).model_type, describe(model)
    if kind not in ROTARY_HALVES:
        raise HeadsinkError(
            f"positions: {kind} does not support cache-relative ones; these do: {', '.join(ROTARY_HALVES)}"
        )
    if not shape.prefix_free:
        raise HeadsinkError("positions: this model's rotary positions depend on the length of the text: use 'absolute'")
    rotary = decoder(model).rotary_emb
    found = getattr(rotary, "full_attention_inv_freq", None)  # Gemma 3 has one for each kind of layer
    inverse: Tensor = rotary.inv_freq if found is None else found  # type: ignore[union-attr, assignment]
    return inverse.float()


def rotary_frequencies(model: nn.Module) -> Tensor | None:
    """As `inverse_frequencies`; None where they are not known, or where they change with the length of the text."""
    try:
        return inverse_frequencies(model)
    except HeadsinkError:
        return None


def rotate(vectors: Tensor, distance: int, inverse: Tensor) -> Tensor:
    """Move rotated vectors, [..., dim], to a position `distance` tokens later. inverse: float32 [pairs]."""
    return rotate_back(vectors, torch.tensor(-distance, device=vectors.device), inverse)


def rotate_back(vectors: Tensor, distance: Tensor, inverse: Tensor) -> Tensor:
    """Move rotated vectors to a position `distance` tokens earlier.

    vectors: [batch, heads, tokens, dim]; distance: int [tokens], [batch, 1, tokens] or a number; inverse: float32 [pairs].
    Returns float32 or better.
    """
    kind = torch.promote_types(vectors.dtype, torch.float32)
    angles = distance[..., None].to(kind) * inverse.to(device=vectors.device, dtype=kind)
    cos, sin, half = angles.cos(), angles.sin(), len(inverse)
    a, b = vectors[..., :half].to(kind), vectors[..., half : 2 * half].to(kind)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, vectors[..., 2 * half :].to(kind)], -1)
