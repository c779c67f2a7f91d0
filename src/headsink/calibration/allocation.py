"""How many keys each head gets of contexts that are told again: by need, and by the loss where heads are few.

Heads compete for keys by the attention that telling calibration documents again takes (reconstruction.py). Over tens of heads
what that leaves out averages away: a search gains nothing on documents that it has not seen (docs/calibration.md). A model with
a handful of global heads has nothing to average over, and few numbers to find: there they are moved one by one while the loss
of the replays falls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 16  # heads whose numbers are moved one by one
FACTORS = (0.0, 0.5, 2**-0.5, 2**0.5, 2.0)  # tried on the number of each head
RECENT = (0.0, 0.25, 0.5, 0.75, 1.0)  # tried as the part of a head's keys that are its last
NONE = 1e-9  # of the context: a head with less has no keys
LEAST = 1 / 128  # of the mean: what a head without keys is taken to have, so that it may get some
GAIN = 0.02  # of the loss, that a sweep over the heads must gain for another to follow
SWEEPS = 4  # at most


def allocate(need: Tensor, share: float) -> Tensor:
    """How many keys each head needs if all may have `share` of them, and heads compete: shares of its own, float64 [layers, KV
    heads]. need: [layers, KV heads, samples], as `Demand.attention`, of layers that do not slide."""
    rest = int((1 - share) * (need.numel() - 1))  # quantile() refuses more than 2^24 numbers
    return (need > need.flatten().kthvalue(1 + rest).values).double().mean(-1)


def transfer(shares: Tensor, head: int, factor: float) -> Tensor | None:
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


@dataclass(frozen=True)
class Allocation:
    """What each head keeps. shares: float64 [heads], of the context, beyond the smallest pattern. recent: float64 [heads], how
    much of that, from 0 to 1, are its last keys; the rest are top-k keys."""

    shares: Tensor
    recent: Tensor

    def trials(self, head: int) -> tuple[list[Allocation], list[Allocation]]:
        """With other keys for one head, and with more or fewer of them."""
        recent = [self.recent.clone().index_fill(0, torch.tensor(head), part) for part in RECENT]
        shares = [found for factor in FACTORS if (found := transfer(self.shares, head, factor)) is not None]
        return (
            [Allocation(self.shares, one) for one in recent if one[head] != self.recent[head]],
            [Allocation(one, self.recent) for one in shares],
        )


def coordinate_descent(
    deal: Allocation, loss: Callable[[Allocation], float], report: Callable[[Allocation, float], None]
) -> Allocation:
    """A deal with a lower loss, of the same sum. `report` is called after each head with the deal reached and its loss."""
    best = loss(deal)
    for _ in range(SWEEPS):
        before = best
        for head in range(len(deal.shares)):
            for kind in range(2):
                trials = deal.trials(head)[kind]
                losses = [loss(trial) for trial in trials]
                if losses and min(losses) < best:
                    best = min(losses)
                    deal = trials[losses.index(best)]
            report(deal, best)
        if best > (1 - GAIN) * before:
            break
    return deal
