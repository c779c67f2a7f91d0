"""The first question: is head h a sink in a later layer because head h is one in an earlier layer?

Head h of one layer and head h of another share nothing but the number, so agreement has to beat chance: the base rate of
the later layer, and a permutation test that gives the heads of every layer other numbers. The query heads of a KV head
lie side by side and are alike, so whole KV heads are shuffled, and query heads within each: to shuffle heads one by one
would make agreement by chance look rarer than it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

PERMUTATIONS = 10_000
AT_ONCE = 500
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


def transfer(sinks: Tensor, rule: str, *, group: int = 1, seed: int = 0) -> Transfer:
    """Test agreement between layers. sinks: bool [layers, heads], is this head a sink; group: query heads per KV head."""
    layers, heads = sinks.shape
    counts = sinks.sum(1).double()
    generator = torch.Generator().manual_seed(seed)
    found = _overlap(sinks)
    as_many = torch.zeros(layers, layers)  # shuffles in which two layers agree as often as they do, or more
    pairs, with_first = 0, 0
    upper = torch.triu(torch.ones(layers, layers, dtype=torch.bool), 1)
    for _ in range(0, PERMUTATIONS, AT_ONCE):
        shuffled = _overlap(_renumbered(sinks, group, AT_ONCE, generator))
        as_many += (shuffled >= found).sum(0)
        pairs += int((shuffled[:, upper].sum(1) >= found[upper].sum()).sum())
        with_first += int((shuffled[:, 0, 1:].sum(1) >= found[0, 1:].sum()).sum())
    chance = counts[:, None] * counts / heads
    following = torch.arange(layers - 1, -1, -1)
    pair_rate, pair_chance, pair_p = _test(found[upper].sum(), chance[upper].sum(), (counts * following).sum(), pairs)
    first_rate, first_chance, first_p = _test(
        found[0, 1:].sum(), chance[0, 1:].sum(), counts[0] * (layers - 1), with_first
    )
    varied = (counts > 0) & (counts < heads)  # else the overlap can only be one number
    testable = upper & varied & varied[:, None]
    p_values = (1 + as_many[testable]) / (1 + PERMUTATIONS)
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
        significant_pairs=int((p_values < 0.05).sum()),
        testable_pairs=int(testable.sum()),
    )


def conditional(sinks: Tensor) -> Tensor:
    """P(head h is a sink in layer b | it is one in layer a): float64 [layers a, layers b], NaN where a has none."""
    overlap = sinks.double() @ sinks.double().T
    return overlap / sinks.sum(1, keepdim=True)


def _renumbered(sinks: Tensor, group: int, times: int, generator: torch.Generator) -> Tensor:
    """The heads of every layer under other numbers: bool [times, layers, heads]."""
    layers, heads = sinks.shape
    kv_heads = torch.rand(times, layers, heads // group, generator=generator).argsort(-1)
    within = torch.rand(times, layers, heads // group, group, generator=generator).argsort(-1)
    order = (kv_heads[..., None] * group + within).flatten(2)
    return sinks.expand(times, -1, -1).gather(2, order)


def _overlap(sinks: Tensor) -> Tensor:
    """How many numbers are sinks in both of two layers: float32 [..., layers, layers]."""
    return sinks.float() @ sinks.float().transpose(-1, -2)


def _test(
    found: Tensor, expected: Tensor, trials: Tensor, as_many: int
) -> tuple[float | None, float | None, float | None]:
    """Rate, chance rate and permutation p-value (with the observed arrangement counted, so never 0)."""
    if not float(trials):
        return None, None, None
    return float(found) / float(trials), float(expected) / float(trials), (1 + as_many) / (1 + PERMUTATIONS)


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
