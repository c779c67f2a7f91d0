"""The fingerprint by which a plan recognizes its model: the shape of its heads and a hash of its weights.

The hash rounds weights to bfloat16, so it is the same for the float32 and bfloat16 versions of a checkpoint. A float16 version
may have another hash. Therefore a fingerprint also has a few values of every parameter, and a float16 model matches if all of
them agree within rounding error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headsink.models.distributed import whole_parameter
from headsink.models.spec import WITHIN, Architecture, describe, unwrap, wrappers
from headsink.utils.format import harmless

Hashed = Literal["weights", "unquantised"]
# The advice in error messages about other weights.
ALLOWED = "use plan.for_model(model), or --other-weights on the command line"
EVERY = 16  # one of so many hashed values of a parameter is stored: four of most parameters


class Part(BaseModel):
    """A part of a plan file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Fingerprint(Part):
    """The model that a plan is for.

    weights: hash of all weights. unquantised: hash of the weights outside linear layers, by which a plan recognizes a quantised
    copy of its model. values: some values of every parameter as hexadecimal digits, 16 bits each: float16 if `float16` (the
    model was in float16), else bfloat16. Empty in older plans.
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
        """Return the fields that describe the shape, not the weights."""
        numbers = {name: getattr(shape, name) for name in ("layers", "query_heads", "kv_heads", "head_dim")}
        return {"architecture": shape.name, **numbers}

    def other_weights(self, model: nn.Module) -> str | None:
        """Return an error message if the weights of a model of the same shape are not these, else None."""
        quantised = has_quantised_linears(model)
        # In a quantised copy only unquantised parameters can match.
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
                "the plan is for other weights, or for these before they were rounded to float16, which a plan of this age "
                f"cannot tell: make it again, or {ALLOWED}"
            )
        if quantised and self.float16 != has_float16(weights):
            weights = sampled_weights(model)
        return None if self.is_rounded(weights, quantised) else other

    def other_hash(self, found: str, which: Hashed) -> str | None:
        """Return an error message if the hash `which` is not `found`, else None."""
        planned: str = getattr(self, which)
        if planned == found:
            return None
        return (
            f"the plan is for other weights: the hash of {which} is {found[:12]} here and {harmless(planned, 12)} in the plan; "
            f"if this is a fine-tune of that model, {ALLOWED}"
        )

    def is_rounded(self, weights: Sequence[WeightSample], quantised: bool) -> bool:
        """Whether the weights of a model equal these within rounding, where exactly one side was in float16.

        quantised: ignore the matrices of linear layers.
        """
        if self.float16 == has_float16(weights):
            return False
        types = (torch.float16, torch.bfloat16) if self.float16 else (torch.bfloat16, torch.float16)
        ours, theirs = np.frombuffer(bytes.fromhex(self.values), np.int16), _values(weights, types[1])
        if len(ours) != len(theirs):
            return False
        pair = [torch.tensor(half).view(kind).double() for half, kind in zip((ours, theirs), types, strict=True)]
        # Rounding changes a weight by up to half the spacing of its neighbours, which is 2^-7 of its power of two in bfloat16,
        # 2^-10 in float16, and 2^-24 for float16 subnormals.
        power = pair[self.float16].abs().log2().floor().exp2()
        near = (pair[0] - pair[1]).abs() <= power * (2**-8 + 2**-11) + 2**-25
        left_out = torch.tensor([quantised and weight.matrix for weight in weights for _ in weight.values[::EVERY]])
        return bool((near | left_out).all())


def has_float16(weights: Sequence[WeightSample]) -> bool:
    return any(weight.values.dtype == torch.float16 for weight in weights)


def _values(weights: Sequence[WeightSample], kind: torch.dtype) -> Any:
    """Return some values of all weights as the int16 bits of float16 or bfloat16."""
    halves: list[Tensor] = [weight.values[::EVERY].to(kind) for weight in weights]
    return torch.cat(halves).view(torch.int16).numpy()


SAMPLED_WEIGHTS = 64  # values of each parameter that go into the hash


def weights_hash(model: nn.Module, linears: bool = True) -> str:
    """SHA-256 over a fixed sample of every parameter, rounded to bfloat16.

    It does not depend on whether a checkpoint is loaded in float32 or bfloat16, on one device or several, offloaded, or split
    over processes (all of which must call this). Another checkpoint of the same shape has another hash. PEFT adapters count while
    they are active and not merged. linears: include the matrices of linear layers; without them the hash is also the same for a
    copy whose linear layers are quantised.
    """
    return hash_of(sampled_weights(model, linears))


@dataclass(frozen=True)
class WeightSample:
    """Some values of one parameter, in its dtype. matrix: it belongs to a linear layer; adapter: it belongs to a PEFT adapter."""

    name: str
    shape: tuple[int, ...]
    values: Tensor
    matrix: bool = False
    adapter: bool = False

    @classmethod
    def of(cls, name: str, weight: Tensor, **kinds: bool) -> WeightSample:
        flat = weight.flatten()
        return cls(name, tuple(weight.shape), flat[sample_indices(flat.numel()).to(flat.device)].cpu(), **kinds)

    def hashed(self) -> bytes:
        """Return the bytes that are hashed."""
        values = self.values.to(torch.bfloat16).view(torch.int16)
        return f"{self.name} {self.shape}".encode() + values.numpy().tobytes()


def hash_of(weights: Sequence[WeightSample]) -> str:
    """Return `weights_hash` of parameters that are ordered by name."""
    return hashlib.sha256(b"".join(weight.hashed() for weight in weights)).hexdigest()


def sampled_weights(model: nn.Module, linears: bool = True) -> list[WeightSample]:
    """Return some values of every hashed parameter, ordered by name."""
    inside, found = unwrap(model), []
    adapters, matrices = _adapters(inside), _matrices(inside)
    for name, path in _hashed_parameters(inside, linears, adapters).items():
        with whole_parameter(inside, path) as parameter:
            plain = parameter.dequantize() if _is_torchao(parameter) else parameter
            found.append(WeightSample.of(name, plain, matrix=path in matrices, adapter=path in adapters))
    for wrapper in wrappers(model)[:-1]:  # trained prompts are outside the model
        found += [WeightSample.of(name, weight.detach(), adapter=True) for name, weight in _prompts(wrapper)]
    return sorted(found, key=lambda weight: weight.name)


def hashed_names(model: nn.Module, linears: bool = True) -> list[str]:
    """Return the names of the parameters in `weights_hash`, in order."""
    return list(_hashed_parameters(model, linears, {}))


@lru_cache
def sample_indices(values: int) -> Tensor:
    """Return the indices of the sampled ones of so many values: int64."""
    return torch.linspace(0, values - 1, min(SAMPLED_WEIGHTS, values), dtype=torch.float64).long()


def _prompts(wrapper: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the trained parameters of PEFT's prompt tuning and prefix tuning."""
    encoders: Any = dict(wrapper.named_children()).get("prompt_encoder")
    if not encoders:
        return []
    active: Any = wrapper.active_adapter
    return [(f"prompt_encoder.{active}.{name}", weight) for name, weight in encoders[active].named_parameters()]


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter is a torchao tensor or has a dtype of quantised codes."""
    return _is_torchao(parameter) or not parameter.is_floating_point() or parameter.element_size() == 1


def _is_torchao(parameter: Tensor) -> bool:
    return type(parameter.data).__module__.startswith("torchao")


def has_quantised_linears(model: nn.Module) -> bool:
    inside = unwrap(model)
    return any(is_quantised(inside.get_parameter(name)) for name in _matrices(inside))


def _matrices(model: nn.Module) -> set[str]:
    """Return the names of the matrices of linear layers and of their quantisation scales, without adapters. The output layer
    counts as linear even if it is tied to the embedding."""
    linears = (found for found in model.named_modules() if isinstance(found[1], nn.Linear))
    own = (f"{path}.{name}" for path, module in linears for name, _ in module.named_parameters(recurse=False))
    return {name for name in own if not name.endswith(".bias")} - set(_adapters(model))


def _hashed_parameters(model: nn.Module, linears: bool, adapters: dict[str, bool]) -> dict[str, str]:
    """Return {name in a plain model: name in this model} of the hashed parameters, ordered by name."""
    # An offloaded model lists tied weights twice, other models once.
    tied, matrices = set(getattr(model, "all_tied_weights_keys", {})), set() if linears else _matrices(model)
    paths = [path for path, _ in model.named_parameters() if adapters.get(path, True) and path not in matrices]
    names = {".".join(part for part in path.split(".") if part not in WITHIN): path for path in paths}
    return {name: names[name] for name in sorted(names) if name not in tied}


def _adapters(model: nn.Module) -> dict[str, bool]:
    """Return {name: whether it is active and not merged} of the parameters of PEFT adapters."""
    found = {}
    for path, module in model.named_modules():
        if not getattr(module, "adapter_layer_names", ()):
            continue
        layer: Any = module
        active = set() if layer.disable_adapters else set(layer.active_adapters) - set(layer.merged_adapters)
        for name, _ in layer.named_parameters():
            kind, _, rest = name.partition(".")  # lora_A, default.weight
            if kind not in WITHIN:
                found[f"{path}.{name}"] = rest.partition(".")[0] in active
    return found
