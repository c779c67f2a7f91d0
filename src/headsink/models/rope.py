"""Rotary positions counted in the cache: `positions="cache-relative"`, StreamingLLM's way (arXiv 2309.17453).

Keys in a cache already carry the rotation of their place in the text, and what counts is how far a query and a key are apart.
Of the last w tokens that is the same whether places are counted in the text or in a cache of s + w keys. Only the s first tokens
come nearer: to a query at place s + w or later they are as far away as from the last place of the cache. So such a query is
turned back to that place, and with this turned query it looks at the first tokens. No distance ever exceeds s + w, however long
the text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headsink.errors import HeadsinkError
from headsink.models.families import ROTARY_HALVES
from headsink.models.spec import decoder, describe, unwrapped


def inverse_frequencies(model: nn.Module) -> Tensor:
    """By how many radians a place turns each rotary pair of a full-attention layer: float32 [pairs].

    Raises HeadsinkError if the model's positions cannot be counted in the cache.
    """
    kind, shape = unwrapped(model).config.get_text_config(decoder=True).model_type, describe(model)
    if kind not in ROTARY_HALVES:
        raise HeadsinkError(f"positions: {kind} cannot count them in the cache; these can: {', '.join(ROTARY_HALVES)}")
    if not shape.prefix_free:
        raise HeadsinkError("positions: this model's rotary positions depend on the length of the text: use 'absolute'")
    rotary = decoder(model).rotary_emb
    found = getattr(rotary, "full_attention_inv_freq", None)  # Gemma 3 has one for each kind of layer
    inverse: Tensor = rotary.inv_freq if found is None else found  # type: ignore[union-attr, assignment]
    return inverse.float()


def rotate_back(vectors: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
    """Rotated vectors as they would be so many places earlier.

    vectors: [batch, heads, tokens, dim]; places: int [tokens] or [batch, 1, tokens]; inverse: float32 [pairs]. float32 or better.
    """
    kind = torch.promote_types(vectors.dtype, torch.float32)
    angles = places[..., None].to(kind) * inverse.to(device=vectors.device, dtype=kind)
    cos, sin, half = angles.cos(), angles.sin(), len(inverse)
    a, b = vectors[..., :half].to(kind), vectors[..., half : 2 * half].to(kind)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, vectors[..., 2 * half :].to(kind)], -1)
