"""The first question: is head h a sink in a later layer because head h is one in an earlier layer?

Head h of one layer and head h of another share nothing but the number, so agreement has to beat chance: the base rate
of the later layer, and a permutation test that shuffles the head numbers within every layer (and keeps how many sinks
each layer has).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

PERMUTATIONS = 10_000
RULES: dict[str, tuple[str, float]] = {
    "sink tokens": ("sink", 0.5),
    "first token": ("first", 0.5),
    "legacy 0.9": ("legacy", 0.9),
    "legacy 0.8": ("legacy", 0.8),
}  # name -> score and the value from which a head counts as a sink


@dataclass(frozen=True)
class Transfer:
    """Agreement between layers on which head numbers are sinks.

    rate: share of heads that are sinks. pair_rate: P(h is a sink in layer b | it is one in layer a), over all a < b;
    pair_chance: the same if head numbers meant nothing. first_*: the same for a = layer 0. *_p: share of shuffles with at
    least as much agreement. None where no head is a sink in the earlier layers, so that there is nothing to predict from.
    """

    rule: str
    rate: float
    first_layer_rate: float
    pair_rate: float | None
    pair_chance: float | None
    pair_p: float | None
    first_rate: float | None
    first_chance: float | None
    first_p: float | None
    significant_pairs: int
    testable_pairs: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def transfer(sinks: Tensor, rule: str, *, seed: int = 0) -> Transfer:
    """Test agreement between layers. sinks: bool [layers, heads], is this head a sink."""
    layers, heads = sinks.shape
    counts = sinks.sum(1).double()
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(PERMUTATIONS, layers, heads, generator=generator).argsort(-1)
    shuffled = sinks.expand(PERMUTATIONS, -1, -1).gather(2, order)
    later = counts.flip(0).cumsum(0).flip(0) - counts  # sinks in all layers after a
    pair_rate, pair_chance, pair_p = _test(
        _pairs(sinks[None]),
        _pairs(shuffled),
        (counts * torch.arange(layers - 1, -1, -1)).sum(),
        (counts * later).sum() / heads,
    )
    first_rate, first_chance, first_p = _test(
        _with_first(sinks[None]), _with_first(shuffled), counts[0] * (layers - 1), counts[0] * later[0] / heads
    )
    chances = [pair_p_value(sinks[a], sinks[b]) for a in range(layers) for b in range(a + 1, layers)]
    tested = [p for p in chances if p is not None]
    return Transfer(
        rule=rule,
        rate=float(sinks.double().mean()),
        first_layer_rate=float(sinks[0].double().mean()),
        pair_rate=pair_rate,
        pair_chance=pair_chance,
        pair_p=pair_p,
        first_rate=first_rate,
        first_chance=first_chance,
        first_p=first_p,
        significant_pairs=sum(p < 0.05 for p in tested),
        testable_pairs=len(tested),
    )


def conditional(sinks: Tensor) -> Tensor:
    """P(head h is a sink in layer b | it is one in layer a): float64 [layers a, layers b], NaN where a has none."""
    overlap = sinks.double() @ sinks.double().T
    return overlap / sinks.sum(1, keepdim=True)


def pair_p_value(a: Tensor, b: Tensor) -> float | None:
    """P(at least this overlap) if the numbers of the sinks in two layers are unrelated (hypergeometric, exact).

    None where the overlap can only be one number: a layer with no sinks, or with nothing else.
    """
    heads, n_a, n_b, overlap = len(a), int(a.sum()), int(b.sum()), int((a & b).sum())
    if {n_a, n_b} & {0, heads}:
        return None
    ways = sum(math.comb(n_a, k) * math.comb(heads - n_a, n_b - k) for k in range(overlap, min(n_a, n_b) + 1))
    return ways / math.comb(heads, n_b)


def _pairs(sinks: Tensor) -> Tensor:
    """Heads that are sinks in two layers, over all pairs of layers: [..., layers, heads] -> [...]."""
    layers_per_head = sinks.sum(-2).double()
    return (layers_per_head * (layers_per_head - 1) / 2).sum(-1)


def _with_first(sinks: Tensor) -> Tensor:
    """The same over the pairs of layer 0 with each other layer."""
    return (sinks[..., 0, :] * sinks[..., 1:, :].sum(-2)).double().sum(-1)


def _test(
    found: Tensor, shuffled: Tensor, trials: Tensor, expected: Tensor
) -> tuple[float | None, float | None, float | None]:
    """Rate, chance rate and permutation p-value (with the observed arrangement counted, so never 0)."""
    if not float(trials):
        return None, None, None
    p = (1 + int((shuffled >= found).sum())) / (1 + len(shuffled))
    return float(found) / float(trials), float(expected) / float(trials), p


def sentence(result: Transfer) -> str:
    """The answer in words."""
    if result.first_rate is None:
        first = "no head of the first layer is a sink, so the first layer predicts nothing"
    else:
        first = (
            f"a head that is a sink in the first layer is one in a later layer in {result.first_rate:.0%} of cases "
            f"(chance {result.first_chance:.0%}, p = {result.first_p:.2g})"
        )
    if result.pair_rate is None:
        return f"By {result.rule}: {first}."
    return (
        f"By {result.rule}: {first}. Over all pairs of layers, a head that is a sink in one is a sink in the later one in "
        f"{result.pair_rate:.0%} of cases (chance {result.pair_chance:.0%}, p = {result.pair_p:.2g})."
    )
