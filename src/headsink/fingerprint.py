"""How a plan knows its model: by the numbers of its heads and a hash of its weights.

The hash rounds weights to bfloat16, so float32 and bfloat16 of a checkpoint are one model. float16 rounds otherwise, and the hash
of what it leaves may differ. So a fingerprint has a few values of every parameter too, and float16 is the same model if all of
them are as near as rounding the same weights leaves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headsink.architecture import Architecture, Sampled, describe, has_quantised_linears, hash_of, sampled_weights
from headsink.summary import harmless

Hashed = Literal["weights", "unquantised"]
# What to do about other weights, in the lines that refuse them.
ALLOWED = "use plan.for_model(model), or --other-weights on the command line"
EVERY = 16  # of the values of a parameter that are hashed, each of so many is kept: four of most parameters


class Part(BaseModel):
    """A part of a plan file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Fingerprint(Part):
    """The model that a plan is for.

    weights: a hash of them; unquantised: of those that quantising linear layers leaves as they are, by which a plan knows a
    quantised copy of its model. values: some of every parameter, 16 bits each, as hexadecimal digits: bfloat16, or float16 if
    `float16`, where weights have been rounded to it. Plans made before there were values have none.
    """

    architecture: str
    layers: Annotated[int, Field(gt=0)]
    query_heads: Annotated[int, Field(gt=0)]
    kv_heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    weights: str
    unquantised: str = ""
    float16: bool = False
    values: Annotated[str, Field(pattern="^([0-9a-f]{4})*$")] = ""

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        weights = sampled_weights(model)
        return cls(
            **cls.shapes(describe(model)),
            weights=hash_of(weights),
            unquantised=hash_of([weight for weight in weights if not weight.matrix]),
            float16=has_float16(weights),
            values=_values(weights, torch.float16 if has_float16(weights) else torch.bfloat16).tobytes().hex(),
        )

    @staticmethod
    def shapes(shape: Architecture) -> dict[str, Any]:
        """All but what is known of the weights."""
        numbers = {name: getattr(shape, name) for name in ("layers", "query_heads", "kv_heads", "head_dim")}
        return {"architecture": shape.name, **numbers}

    def other_weights(self, model: nn.Module) -> str | None:
        """Why the weights of a model of the same shape are not these, as a line for the user; None if they are."""
        quantised = has_quantised_linears(model)
        # Of a quantised copy only what is not quantised can be the same.
        which: Hashed = "unquantised" if quantised else "weights"
        weights = sampled_weights(model, linears=not quantised)
        other = self.other_hash(hash_of(weights), which)
        if other is None:
            return None
        base = [weight for weight in weights if not weight.adapter]
        if len(base) < len(weights) and self.other_hash(hash_of(base), which) is None:
            return f"the plan is for this model without its adapter, which makes it a fine-tune: {ALLOWED}"
        if has_float16(weights) and not self.values:
            return (
                "the plan is for other weights, or for these before they were rounded to float16, which a plan as old as this "
                f"cannot tell: make it again, or {ALLOWED}"
            )
        if quantised and self.float16 != has_float16(weights):
            weights = sampled_weights(model)
        return None if self.is_rounded(weights, quantised) else other

    def other_hash(self, found: str, which: Hashed) -> str | None:
        """The same of a hash alone; `which` of the two it is."""
        planned: str = getattr(self, which)
        if planned == found:
            return None
        return (
            f"the plan is for other weights: the hash of {which} is {found[:12]} here and {harmless(planned, 12)} in the plan; "
            f"if this is a fine-tune of that model, {ALLOWED}"
        )

    def is_rounded(self, weights: Sequence[Sampled], quantised: bool) -> bool:
        """Whether all weights of a model are these ones but for float16, which either the model is in or this was taken in.

        quantised: leave out the matrices of linear layers.
        """
        if self.float16 == has_float16(weights):
            return False
        types = (torch.float16, torch.bfloat16) if self.float16 else (torch.bfloat16, torch.float16)
        ours, theirs = np.frombuffer(bytes.fromhex(self.values), np.int16), _values(weights, types[1])
        if len(ours) != len(theirs):
            return False
        pair = [torch.tensor(half).view(kind).double() for half, kind in zip((ours, theirs), types, strict=True)]
        # Rounding moves a weight by up to half the distance of its neighbours: 2^-7 of its power of two in bfloat16, 2^-10 in
        # float16, and 2^-24 for the smallest of float16.
        power = pair[self.float16].abs().log2().floor().exp2()
        near = (pair[0] - pair[1]).abs() <= power * (2**-8 + 2**-11) + 2**-25
        left_out = torch.tensor([quantised and weight.matrix for weight in weights for _ in weight.values[::EVERY]])
        return bool((near | left_out).all())


def has_float16(weights: Sequence[Sampled]) -> bool:
    return any(weight.values.dtype == torch.float16 for weight in weights)


def _values(weights: Sequence[Sampled], kind: torch.dtype) -> Any:
    """Some values of all weights: the bits of float16 or bfloat16, as int16."""
    halves: list[Tensor] = [weight.values[::EVERY].to(kind) for weight in weights]
    return torch.cat(halves).view(torch.int16).numpy()
