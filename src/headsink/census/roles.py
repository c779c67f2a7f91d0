"""What a head does, in one word, and how wide a window it needs.

A role is read from where the attention goes, against what flat attention would give at that length: what counts is the
excess (m - u) / (1 - u) of a mass m over its uniform u, 0 at chance and 1 if everything lies there. A head looks far if its far
mass is at least `FAR` of the uniform one: `retrieval` if one key at a time gets much of that, and much more than by chance,
`diffuse` if it is spread. Otherwise it is `sink` or `local` if one of the two has most of the excess, `mixed` if neither, and
again `diffuse` if it differs from flat attention by less than `LEAST`. A role always belongs to a length, a text and these
thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Role = Literal["sink", "local", "mixed", "diffuse", "retrieval"]
ROLES: tuple[Role, ...] = ("sink", "local", "mixed", "diffuse", "retrieval")
MASSES = ("sink", "local", "far", "far_peak", "learned")

FAR = 0.25  # of the uniform far mass: from there a head looks far
PEAK = 0.25  # of the far mass on its strongest key: from there looking far is retrieval
PEAK_OVER_CHANCE = 4.0  # times what the strongest key has in flat attention, which is much on short texts
MOST = 0.75  # of the excess of sink and local: from there that one names the head
LEAST = 0.1  # excess below which attention counts as flat
EPSILON = 0.01  # squared error of a head's output, relative to the layer's, that a window may cost


def roles(mass: Mapping[str, Tensor], uniform: Mapping[str, Tensor]) -> Tensor:
    """Index into ROLES: int64 of the shape of its arguments, which hold MASSES. Attention to a learned logit counts as sink."""
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
    found = torch.full(far.shape, ROLES.index("mixed"))
    for condition, name in reversed(names):
        found[condition] = ROLES.index(name)
    return found


def _excess(mass: Tensor, uniform: Tensor) -> Tensor:
    return ((mass - uniform) / (1 - uniform).clamp(min=1e-12)).clamp(0, 1)


def window_needed(errors: Tensor, windows: list[int], length: int, epsilon: float = EPSILON) -> Tensor:
    """The smallest window from which on the error stays within epsilon: float64, [..., windows] -> [...].

    Between the windows that were measured the logarithm of the error is taken as linear in that of the window. `length` where no
    smaller window will do, 0 where the sink tokens are enough.
    """
    reached = (errors <= epsilon).flip(-1).long().cumprod(-1).flip(-1).bool()  # and so do all wider ones
    enough = torch.where(reached.any(-1), reached.long().argmax(-1), len(windows))
    sizes = torch.tensor([*windows, length], dtype=torch.float64)
    padded = torch.cat([errors.double(), torch.zeros_like(errors[..., :1]).double()], -1).clamp(min=1e-12)
    after, before = enough, (enough - 1).clamp(min=0)
    low, high = (padded.gather(-1, at[..., None])[..., 0].log() for at in (before, after))
    share = ((low - torch.tensor(epsilon).log()) / (low - high).clamp(min=1e-12)).clamp(0, 1)
    start, end = sizes[before].clamp(min=1).log(), sizes[after].clamp(min=1).log()
    between = (start + share * (end - start)).exp()
    return torch.where(enough == 0, 0.0, torch.where(enough == len(windows), float(length), between))


def figures(needed: Tensor, near: int, length: int) -> dict[str, float]:
    """Of the windows that heads need: the median, the share of heads that make do with `near` keys, the share that needs all."""
    return {
        "median": float(needed.median()),
        "near": float((needed <= near).double().mean()),
        "all": float((needed >= length).double().mean()),
    }


def law(needed: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Fit `window = scale x length ^ exponent` by least squares on logarithms.

    needed: [lengths, ...]. Returns scale and exponent, float64 [...]. An exponent of 0 is a window that does for every length, of
    1 one that grows with the text.
    """
    x = torch.tensor(lengths, dtype=torch.float64).log()
    y = needed.double().clamp(min=1).log()
    x = (x - x.mean()).view(-1, *[1] * (y.dim() - 1))
    exponent = (x * (y - y.mean(0))).sum(0) / x.square().sum()
    mean = torch.tensor(lengths, dtype=torch.float64).log().mean()
    return (y.mean(0) - exponent * mean).exp(), exponent
