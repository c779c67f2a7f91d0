"""The form of a module that the compiled decode step computes: of a norm, an activation or a router.

The form is the one whose outputs are those of the module, so the class of the module does not matter.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headsink.decoding.fields import Activation, NormKind, Scores
from headsink.errors import HeadsinkError

ACTIVATIONS = {
    Activation.SILU: F.silu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.GELU: F.gelu,
    Activation.RELU: F.relu,
    Activation.RELU_SQUARED: lambda x: F.relu(x).square(),
    Activation.SIGMOID: torch.sigmoid,
}
XIELU = ("alpha_p", "alpha_n", "beta", "eps")  # parts of transformers' XIELUActivation
EPS = ("variance_epsilon", "eps", "norm_eps")
_norms: weakref.WeakKeyDictionary[nn.Module, tuple[NormKind, int, float]] = weakref.WeakKeyDictionary()
GAPS = 0.02  # relative difference of outputs that are the same up to rounding in bfloat16


@dataclass(frozen=True)
class Norm:
    """weight, bias: float32 [columns], or [period, columns] of groups of columns; None for none."""

    kind: NormKind
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Xielu:
    """x > 0: positive x^2 + beta x; else negative (expm1(min(x, eps)) - x) + beta x (arXiv 2411.13010)."""

    positive: float
    negative: float
    beta: float
    eps: float


def activation_of(function: Any) -> Activation | Xielu:
    if all(isinstance(getattr(function, name, None), Tensor) for name in XIELU):
        positive, negative, beta, eps = (getattr(function, name).detach().float() for name in XIELU)
        return Xielu(float(F.softplus(positive)), float(beta + F.softplus(negative)), float(beta), float(eps))
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
    if module not in _norms:
        _norms[module] = _norm_form(module, shape)
    kind, offset, eps = _norms[module]
    gain = None if weight is None else weight.detach().float() + offset
    return Norm(kind, gain, None if bias is None else bias.detach().float(), eps)


@torch.no_grad()
def _norm_form(module: Any, shape: tuple[int, ...]) -> tuple[NormKind, int, float]:
    """The form of a norm, what it adds to its weight, and its eps: those that come closest to its outputs."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    # at the second scale eps makes a difference
    inputs = [(probe * scale).to(torch.float32 if weight is None else weight.dtype) for scale in (1, 0.003)]
    outputs = [module(x[None, None])[0, 0].float() for x in inputs]
    given = [epsilon for name in EPS if isinstance(epsilon := getattr(module, name, None), float)]

    def error(form: tuple[NormKind, int, float]) -> float:
        kind, offset, eps = form
        errors = []
        for x, found in zip(inputs, outputs, strict=True):
            own = x.float() - (x.float().mean(-1, keepdim=True) if kind == NormKind.LAYER else 0)
            expected = own * (own.square().mean(-1, keepdim=True) + eps).rsqrt()
            expected = expected if weight is None else expected * (weight.float() + offset)
            expected = expected if bias is None else expected + bias.float()
            errors.append(float((found - expected).norm() / expected.norm().clamp(min=1e-12)))
        return max(errors)

    best = min(product(NormKind, (0, 1), given[:1] or (1e-5, 1e-6, 1e-12)), key=error)
    if error(best) > GAPS:
        raise HeadsinkError(f"its {type(module).__name__} is neither RMS norm nor layer norm")
    return best


@torch.no_grad()
def routing_of(router: Any, weight: Tensor, bias: Tensor | None) -> tuple[int, Scores, bool, float, Tensor | None]:
    """How a router chooses: top-k, scores, whether shares are normalised, their scale, and the bias of the choice."""
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    arguments, added = (x[None],) if hasattr(router, "gate") else (x,), getattr(router, "bias", None)
    try:
        _, shares, chosen = router(*arguments, *(() if bias is None or hasattr(router, "moe_statics") else (bias,)))
    except TypeError:
        _, shares, chosen = router(*arguments)
    logits = F.linear(x.float(), weight.float(), None if added is None else added.float())
    extra = None if bias is None else bias.detach().float().contiguous()
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
