"""How many keys each head gets of contexts that are told again: by need, and by the loss where heads are few.

Heads compete for keys by the attention that telling calibration documents again takes (reconstruction.py). Over tens of heads
what that leaves out averages away: a search gains nothing on documents that it has not seen (docs/calibration.md). A model with
a handful of global heads has nothing to average over, and few numbers to find: there they are moved one by one while the loss
of the replays falls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FEW = 16  # heads whose numbers are moved one by one
FACTORS = (0.0, 0.5, 2**-0.5, 2**0.5, 2.0)  # tried on the number of each head
NONE = 1e-9  # of the context: a head with less has no keys
LEAST = 1 / 128  # of the mean: what a head without keys is taken to have, so that it may get some
GAIN = 0.02  # of the loss, that a sweep over the heads must gain for another to follow
SWEEPS = 4  # at most


def needed(need: Tensor, share: float) -> Tensor:
    """How many keys each head needs if all may have `share` of them, and heads compete: shares of its own, float64 [layers, KV
    heads]. need: [layers, KV heads, samples], as `Demand.attention`, of layers that do not slide."""
    rest = int((1 - share) * (need.numel() - 1))  # quantile() refuses more than 2^24 numbers
    return (need > need.flatten().kthvalue(1 + rest).values).double().mean(-1)


def moved(shares: Tensor, head: int, factor: float) -> Tensor | None:
    """`factor` times as many keys for a head, at most all; what it gains the others lose in proportion, and the other way round.

    shares: float64 [heads], of the context. None where that is not possible.
    """
    own = min(max(float(shares[head]), LEAST * float(shares.mean())) * factor, 1.0)
    others, left = shares.clone(), float(shares.sum()) - own
    others[head] = 0
    others[others < NONE] = 0
    if not 0 <= left <= int((others > 0).sum()):
        return None
    full = torch.zeros_like(others, dtype=torch.bool)
    while abs(left - float(others.sum())) > NONE:  # those that are full leave the rest to the others
        others = torch.where(full, 1.0, others * ((left - int(full.sum())) / others[~full].sum())).clamp(max=1)
        full = others >= 1
    others[head] = own
    return others


def tuned(shares: Tensor, loss: Callable[[Tensor], float], report: Callable[[Tensor, float], None]) -> Tensor:
    """Numbers with a lower loss, of the same sum. shares: float64 [heads]. `report` is called after each head with the numbers
    reached and their loss."""
    best = loss(shares)
    for _ in range(SWEEPS):
        before = best
        for head in range(len(shares)):
            trials = [trial for factor in FACTORS if (trial := moved(shares, head, factor)) is not None]
            losses = [loss(trial) for trial in trials]
            if losses and min(losses) < best:
                best = min(losses)
                shares = trials[losses.index(best)]
            report(shares, best)
        if best > (1 - GAIN) * before:
            break
    return shares
