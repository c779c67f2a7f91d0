"""Cache-relative rotary positions, `positions="cache-relative"`, for streaming generation (StreamingLLM, arXiv 2309.17453).

Cached keys are already rotated by their absolute position, and attention depends only on the distance of query and key. For the
last w tokens this distance is the same in the text and in a cache of s + w keys. Only the distance to the s sink tokens differs:
a query at position s + w or later attends to them from position s + w - 1, the last of the cache. Such a query is rotated back
to that position for the sink tokens only. Thus no distance exceeds s + w, for texts of any length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headsink.models.spec import decoder


def inverse_frequencies(model: nn.Module, kind: str = "full_attention") -> Tensor | None:
    """Return the inverse rotary frequencies of layers of a kind, radians per position: float32 [pairs].

    None if the model has none under transformers' usual names.
    """
    return frequencies_of(getattr(decoder(model), "rotary_emb", None), kind)


def frequencies_of(rotary: nn.Module | None, kind: str = "full_attention") -> Tensor | None:
    """As `inverse_frequencies`, of a module that computes rotary embeddings."""
    found = getattr(rotary, f"{kind}_inv_freq", None)  # Gemma 3 has one for each kind of layer
    found = getattr(rotary, "inv_freq", None) if found is None else found
    return found.float() if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class Rotary:
    """How a layer rotates queries and keys by position.

    inverse: inverse rotary frequencies, radians per position, float32 [pairs]; zeros if the layer has no positions. interleaved:
    coordinates 2n and 2n + 1 are a pair (GLM, Cohere), not n and n + pairs. Coordinates after the pairs stay as they are.
    """

    inverse: Tensor
    interleaved: bool = False

    @property
    def pairs(self) -> int:
        return len(self.inverse)


def rotate(vectors: Tensor, distance: int, rotary: Rotary) -> Tensor:
    """Move rotated vectors, [..., dim], to a position `distance` tokens later."""
    return rotate_back(vectors, torch.tensor(-distance, device=vectors.device), rotary)


def rotate_back(vectors: Tensor, distance: Tensor, rotary: Rotary) -> Tensor:
    """Move rotated vectors to a position `distance` tokens earlier.

    vectors: [batch, heads, tokens, dim]; distance: int [tokens], [batch, 1, tokens] or a number. Returns float32 or better.
    """
    kind = torch.promote_types(vectors.dtype, torch.float32)
    angles = distance[..., None].to(kind) * rotary.inverse.to(device=vectors.device, dtype=kind)
    cos, sin, pairs = angles.cos(), angles.sin(), rotary.pairs
    rotated, rest = vectors[..., : 2 * pairs].to(kind), vectors[..., 2 * pairs :].to(kind)
    a, b = (rotated[..., ::2], rotated[..., 1::2]) if rotary.interleaved else rotated.chunk(2, -1)
    found = a * cos + b * sin, b * cos - a * sin
    return torch.cat([torch.stack(found, -1).flatten(-2), rest] if rotary.interleaved else [*found, rest], -1)
