"""Roles of attention heads (sink, local, mixed, diffuse, retrieval) and the window that a head needs.

A role compares attention masses with those of flat attention at the same length, by the excess (m - u) / (1 - u) of a mass m over
its uniform value u: 0 at chance, 1 if all attention is there. A head is far if its far mass is at least `FAR` of the uniform one:
`retrieval` if a single key gets much of it, and much more than by chance, otherwise `diffuse`. Other heads are `sink` or `local`
if one of the two has most of the excess, `mixed` if neither has, and `diffuse` if the excess is below `LEAST`. A role always
belongs to a length, a text and these thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Role = Literal["sink", "local", "mixed", "diffuse", "retrieval"]
ROLES: tuple[Role, ...] = ("sink", "local", "mixed", "diffuse", "retrieval")
MASSES = ("sink", "local", "far", "far_peak", "learned")

FAR = 0.25  # least share of the uniform far mass of a far head
PEAK = 0.25  # least share of the far mass on its strongest key for retrieval
PEAK_OVER_CHANCE = 4.0  # and least multiple of that share under flat attention, which is high on short texts
MOST = 0.75  # least share of sink or local in the excess of both, for that role
LEAST = 0.1  # excess below which attention is considered flat
EPSILON = 0.01  # largest squared error of a head's output under a window, relative to the layer's output


def roles(mass: Mapping[str, Tensor], uniform: Mapping[str, Tensor]) -> Tensor:
    """Roles as indices into ROLES, int64 of the shape of each of MASSES. Attention to a learned sink logit counts as sink."""
    sink = _excess(mass["sink"] + mass["learned"], uniform["sink"])
    local = _excess(mass["local"], uniform["local"])
    far = (uniform["far"] > 0) & (mass["far"] >= FAR * uniform["far"])
    chance = PEAK_OVER_CHANCE * uniform["far_peak"] / uniform["far"].clamp(min=1e-12)
    peaked = mass["far_peak"] >= torch.maximum(chance, torch.full_like(chance, PEAK)) * mass["far"]
    near = sink + local
    names = [
        (far & peaked, "retrieval"),
        (far | (near < LEAST), "diffuse"),
        (sink >= MOST * near, "sink"),
        (local >= MOST * near, "local"),
    ]
    role = torch.full(far.shape, ROLES.index("mixed"))
    for condition, name in reversed(names):
        role[condition] = ROLES.index(name)
    return role


def _excess(mass: Tensor, uniform: Tensor) -> Tensor:
    return ((mass - uniform) / (1 - uniform).clamp(min=1e-12)).clamp(0, 1)


def required_window(errors: Tensor, windows: list[int], length: int, epsilon: float = EPSILON) -> Tensor:
    """The smallest window for which, and for all larger ones, the error is at most epsilon: float64, [..., windows] -> [...].

    Interpolated log-linearly between measured windows. `length` if no smaller window is enough, 0 if sink tokens are enough.
    """
    small = (errors <= epsilon).flip(-1).long().cumprod(-1).flip(-1).bool()  # for all larger windows too
    enough = torch.where(small.any(-1), small.long().argmax(-1), len(windows))
    sizes = torch.tensor([*windows, length], dtype=torch.float64)
    padded = torch.cat([errors.double(), torch.zeros_like(errors[..., :1]).double()], -1).clamp(min=1e-12)
    after, before = enough, (enough - 1).clamp(min=0)
    low, high = (padded.gather(-1, at[..., None])[..., 0].log() for at in (before, after))
    share = ((low - torch.tensor(epsilon).log()) / (low - high).clamp(min=1e-12)).clamp(0, 1)
    start, end = sizes[before].clamp(min=1).log(), sizes[after].clamp(min=1).log()
    between = (start + share * (end - start)).exp()
    return torch.where(enough == 0, 0.0, torch.where(enough == len(windows), float(length), between))


def figures(needed: Tensor, near: int, length: int) -> dict[str, float]:
    """Median of the windows that heads need, share of heads that need at most `near` keys, and share that needs all keys."""
    return {
        "median": float(needed.median()),
        "near": float((needed <= near).double().mean()),
        "all": float((needed >= length).double().mean()),
    }


def law(needed: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Fit `window = scale x length ^ exponent` by least squares on logarithms.

    needed: [lengths, ...]. Returns scale and exponent, float64 [...]. With exponent 0 one window is enough at every length, with
    1 it grows in proportion to the length.
    """
    x = torch.tensor(lengths, dtype=torch.float64).log()
    y = needed.double().clamp(min=1).log()
    x = (x - x.mean()).view(-1, *[1] * (y.dim() - 1))
    exponent = (x * (y - y.mean(0))).sum(0) / x.square().sum()
    mean = torch.tensor(lengths, dtype=torch.float64).log().mean()
    return (y.mean(0) - exponent * mean).exp(), exponent
