"""Budget allocation for context reconstruction: divide a KV budget among heads by importance, then by coordinate descent if
there are few heads.

Heads compete for keys by the importance scores of calibration documents (compression/reconstruction.py). With tens of heads the
errors of this allocation average out, and a search gains nothing on held-out documents (docs/calibration.md). In a model with a
handful of global heads they do not, and there are few numbers to search: coordinate descent changes one head's budget at a time
while the loss of the cached documents decreases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headsink.eviction.pattern import Pattern

SINK = 4  # sink tokens of every head that is not full
# recent tokens of such a head: one in 6 of the keys that a head keeps on average, from 8 to 32
WINDOW, LEAST_WINDOW, PART = 32, 8, 6
FLOOR = 8  # top-k keys of every head at least, as in the safeguard of Ada-KV (arXiv 2407.11550)
FEW = 16  # heads at most for coordinate descent
FACTORS = (0.0, 0.5, 2**-0.5, 2**0.5, 2.0)  # tried on the budget of each head
NONE = 1e-9  # share of the context: a head with less has no keys
LEAST = 1 / 128  # of the mean share: assumed for a head without keys, so that a factor can give it some
GAIN = 0.02  # relative decrease of the loss per sweep over the heads, below which the descent stops
SWEEPS = 4  # at most


def smallest(keys: int) -> Pattern:
    """The pattern of a head without top-k keys, in a plan whose heads keep `keys` keys on average."""
    return Pattern(SINK, 0, min(WINDOW, max(LEAST_WINDOW, keys // PART)))


def allocate(importance: Tensor, share: float, floor: float = 0.0) -> Tensor:
    """Head budgets: the share of each head's keys among the most important keys of all heads, float64 [layers, KV heads].

    importance: importance scores [layers, KV heads, samples], of layers without a sliding window. share: budget, the share of all
    keys that is kept. floor: every head has at least this share, or half of `share` if that is less.
    """
    samples = importance.shape[-1]
    own = importance.topk(int(min(floor, share / 2) * samples), -1).indices
    ranked = importance.scatter(-1, own, float("inf"))
    rest = int((1 - share) * (ranked.numel() - 1))  # quantile() fails for more than 2^24 numbers
    return (ranked > ranked.flatten().kthvalue(1 + rest).values).double().mean(-1)


def transfer(shares: Tensor, head: int, factor: float) -> Tensor | None:
    """Multiply a head's share by `factor`, at most to 1, and scale the others to keep the sum.

    shares: float64 [heads], of the context. Returns None where the sum cannot be kept.
    """
    own = min(max(float(shares[head]), LEAST * float(shares.mean())) * factor, 1.0)
    others, left = shares.clone(), float(shares.sum()) - own
    others[head] = 0
    others[others < NONE] = 0
    if not 0 <= left <= int((others > 0).sum()):
        return None
    full = torch.zeros_like(others, dtype=torch.bool)
    while abs(left - float(others.sum())) > NONE:  # heads at 1 leave the rest to the others
        others = torch.where(full, 1.0, others * ((left - int(full.sum())) / others[~full].sum())).clamp(max=1)
        full = others >= 1
    others[head] = own
    return others


def coordinate_descent(
    shares: Tensor, loss: Callable[[Tensor], float], report: Callable[[Tensor, float], None]
) -> Tensor:
    """Lower the loss of head budgets at the same sum. `report` is called after each head, with the current loss.

    shares: float64 [heads], of the context, kept in addition to the smallest pattern.
    """
    best = loss(shares)
    for _ in range(SWEEPS):
        before = best
        for head in range(len(shares)):
            trials = [changed for factor in FACTORS if (changed := transfer(shares, head, factor)) is not None]
            losses = [loss(trial) for trial in trials]
            if losses and min(losses) < best:
                best = min(losses)
                shares = trials[losses.index(best)]
            report(shares, best)
        if best > (1 - GAIN) * before:
            break
    return shares
