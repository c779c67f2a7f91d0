"""The form of a module that the compiled decode step computes: of a norm, an activation or a router.

The form is the one whose outputs are those of the module, so the class of the module does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headsink.errors import HeadsinkError
from headsink.generation.step_fields import Activation, NormKind, Scores

ACTIVATIONS = {
    Activation.SILU: F.silu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.GELU: F.gelu,
    Activation.RELU: F.relu,
    Activation.RELU_SQUARED: lambda x: F.relu(x).square(),
    Activation.SIGMOID: torch.sigmoid,
}
EPS = ("variance_epsilon", "eps", "norm_eps")
GAPS = 0.02  # relative difference of outputs that are the same up to rounding in bfloat16


@dataclass(frozen=True)
class Norm:
    """weight, bias: float32 [columns], or [period, columns] of groups of columns; None for none."""

    kind: NormKind
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def activation_of(function: Any) -> Activation:
    x = torch.linspace(-4, 4, 33)
    with torch.no_grad():
        found = function(x)
    for kind, candidate in ACTIVATIONS.items():
        if torch.allclose(found, candidate(x), atol=1e-5):
            return kind
    raise HeadsinkError(f"its activation is {type(function).__name__}")


def norm_of(module: Any, size: int, count: int = 1) -> Norm:
    """A norm over `size` columns, of `count` groups. One over all groups together is recognised by its weight."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None and weight.dim() == 1 and len(weight) == size * count:
        size = len(weight)
    shape = (size,) if weight is None else tuple(weight.shape)
    if shape[-1] != size or len(shape) > 2 or (len(shape) == 2 and shape[0] != count):
        raise HeadsinkError(f"its {type(module).__name__} has a weight of shape {list(shape)}")
    kind = torch.float32 if weight is None else weight.dtype
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    given = [epsilon for name in EPS if isinstance(epsilon := getattr(module, name, None), float)]
    gains = [None] if weight is None else [weight.detach().float(), weight.detach().float() + 1]
    added = None if bias is None else bias.detach().float()
    forms = product(NormKind, gains, given[:1] or (1e-5, 1e-6, 1e-12))
    candidates = [Norm(form, gain, added, eps) for form, gain, eps in forms]
    errors = [_error(module, norm, [(probe * scale).to(kind) for scale in (1, 0.003)]) for norm in candidates]
    if min(errors) > GAPS:
        raise HeadsinkError(f"its {type(module).__name__} is neither RMS norm nor layer norm")
    return candidates[errors.index(min(errors))]


@torch.no_grad()
def _error(module: Any, norm: Norm, inputs: list[Tensor]) -> float:
    """The largest relative difference of a module and a norm on some inputs."""
    return max(_difference(module(x[None, None])[0, 0].float(), norm, x.float()) for x in inputs)


def _difference(found: Tensor, norm: Norm, own: Tensor) -> float:
    own = own - own.mean(-1, keepdim=True) if norm.kind == NormKind.LAYER else own
    expected = own * (own.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    expected = expected if norm.weight is None else expected * norm.weight
    expected = expected if norm.bias is None else expected + norm.bias
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@torch.no_grad()
def routing_of(router: Any, weight: Tensor, bias: Tensor | None) -> tuple[int, Scores, bool, float, Tensor | None]:
    """How a router chooses: top-k, scores, whether shares are normalised, their scale, and the bias of the choice."""
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    arguments = (x[None],) if hasattr(router, "gate") else (x,)
    try:
        _, shares, chosen = router(*arguments, *(() if bias is None or hasattr(router, "moe_statics") else (bias,)))
    except TypeError:
        _, shares, chosen = router(*arguments)
    logits, extra = F.linear(x.float(), weight.float()), None if bias is None else bias.detach().float().contiguous()
    for kind, scores in ((Scores.SOFTMAX, logits.softmax(-1)), (Scores.SIGMOID, logits.sigmoid())):
        best = (scores if extra is None else scores + extra).topk(chosen.shape[-1], -1).indices
        if (best.sort(-1).values == chosen.sort(-1).values).float().mean() < 0.9:  # ties in bfloat16
            continue
        own = scores.gather(-1, chosen)
        for normalised in (False, True):
            expected = own / own.sum(-1, keepdim=True) if normalised else own
            ratio = shares.float() / expected
            scale = float(ratio.median())
            if float((ratio / scale - 1).abs().median()) < GAPS:
                exact = round(scale, 3)
                return (
                    chosen.shape[-1],
                    kind,
                    normalised,
                    exact if abs(exact / scale - 1) < GAPS / 2 else scale,
                    extra,
                )
    raise HeadsinkError(f"its router {type(router).__name__} chooses experts in another way")
