"""How a plan knows its model: by the numbers of its heads and a hash of its weights.

The hash rounds weights to bfloat16, so float32 and bfloat16 of a checkpoint are one model. float16 rounds otherwise, and the hash
of what it leaves may differ. So a fingerprint has a few values of every parameter too, and float16 is the same model if all of
them are as near as rounding the same weights leaves them.
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
from headsink.models.spec import WITHIN, Architecture, describe, unwrapped, wrappers
from headsink.utils.format import harmless

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


SAMPLED_WEIGHTS = 64  # values of each parameter that go into the hash


def weights_hash(model: nn.Module, linears: bool = True) -> str:
    """SHA-256 over a fixed sample of every parameter, rounded to bfloat16.

    The same for a checkpoint loaded in float32 or bfloat16, in one piece, over devices, offloaded, or split over
    processes (all of which must ask); another checkpoint of the same shape differs. Adapters of PEFT count while they are active
    and not merged. linears: with the matrices of linear layers; without them it is also the same for a checkpoint whose linear
    layers are quantised.
    """
    return hash_of(sampled_weights(model, linears))


@dataclass(frozen=True)
class Sampled:
    """Some values of one parameter, in its dtype. matrix: of a linear layer; adapter: of PEFT."""

    name: str
    shape: tuple[int, ...]
    values: Tensor
    matrix: bool = False
    adapter: bool = False

    @classmethod
    def of(cls, name: str, weight: Tensor, **kinds: bool) -> Sampled:
        flat = weight.flatten()
        return cls(name, tuple(weight.shape), flat[_sampled(flat.numel()).to(flat.device)].cpu(), **kinds)

    def hashed(self) -> bytes:
        """What goes into the hash."""
        values = self.values.to(torch.bfloat16).view(torch.int16)
        return f"{self.name} {self.shape}".encode() + values.numpy().tobytes()


def hash_of(weights: Sequence[Sampled]) -> str:
    """`weights_hash` of parameters in the order of their names."""
    return hashlib.sha256(b"".join(weight.hashed() for weight in weights)).hexdigest()


def sampled_weights(model: nn.Module, linears: bool = True) -> list[Sampled]:
    """Some values of every parameter that counts, in the order of their names."""
    inside, found = unwrapped(model), []
    adapters, matrices = _adapters(inside), _matrices(inside)
    for name, path in _counted(inside, linears, adapters).items():
        with whole_parameter(inside, path) as parameter:
            plain = parameter.dequantize() if _is_torchao(parameter) else parameter
            found.append(Sampled.of(name, plain, matrix=path in matrices, adapter=path in adapters))
    for wrapper in wrappers(model)[:-1]:  # prompts that are trained lie outside the model
        found += [Sampled.of(name, weight.detach(), adapter=True) for name, weight in _prompts(wrapper)]
    return sorted(found, key=lambda weight: weight.name)


def hashed_names(model: nn.Module, linears: bool = True) -> list[str]:
    """Names of the parameters that go into `weights_hash`, in order."""
    return list(_counted(model, linears, {}))


@lru_cache
def _sampled(values: int) -> Tensor:
    """Which of so many values are sampled: int64."""
    return torch.linspace(0, values - 1, min(SAMPLED_WEIGHTS, values), dtype=torch.float64).long()


def _prompts(wrapper: nn.Module) -> list[tuple[str, Tensor]]:
    """What PEFT's prompt tuning and prefix tuning put before a text."""
    encoders: Any = dict(wrapper.named_children()).get("prompt_encoder")
    if not encoders:
        return []
    active: Any = wrapper.active_adapter
    return [(f"prompt_encoder.{active}.{name}", weight) for name, weight in encoders[active].named_parameters()]


def is_quantised(parameter: Tensor) -> bool:
    """Whether it is one of torchao's tensors, which compute in their own way, or of a type that holds codes."""
    return _is_torchao(parameter) or not parameter.is_floating_point() or parameter.element_size() == 1


def _is_torchao(parameter: Tensor) -> bool:
    return type(parameter.data).__module__.startswith("torchao")


def has_quantised_linears(model: nn.Module) -> bool:
    inside = unwrapped(model)
    return any(is_quantised(inside.get_parameter(name)) for name in _matrices(inside))


def _matrices(model: nn.Module) -> set[str]:
    """Names of the matrices of linear layers, with what scales their codes; not of adapters. The output layer is one even if it
    is the embedding."""
    linears = (found for found in model.named_modules() if isinstance(found[1], nn.Linear))
    own = (f"{path}.{name}" for path, module in linears for name, _ in module.named_parameters(recurse=False))
    return {name for name in own if not name.endswith(".bias")} - set(_adapters(model))


def _counted(model: nn.Module, linears: bool, adapters: dict[str, bool]) -> dict[str, str]:
    """Parameters that count, in the order of the names that a plain model has for them: those names, and where they are here."""
    # An offloaded model has tied weights twice, one in memory once.
    tied, matrices = set(getattr(model, "all_tied_weights_keys", {})), set() if linears else _matrices(model)
    paths = [path for path, _ in model.named_parameters() if adapters.get(path, True) and path not in matrices]
    names = {".".join(part for part in path.split(".") if part not in WITHIN): path for path in paths}
    return {name: names[name] for name in sorted(names) if name not in tied}


def _adapters(model: nn.Module) -> dict[str, bool]:
    """Names of the parameters of PEFT's adapters, and whether they are active and not merged into the model's own."""
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
