"""Do sinks in the first layer predict sinks in later layers? Agreement of head numbers between layers, against chance.

Head h of one layer and head h of another share only the number, so agreement is compared with chance: the base rate of the
later layer, and a permutation test over head numbers within each layer. Query heads of one KV head are adjacent and similar, so
whole KV heads are permuted, and query heads within each. Permuting single heads would underestimate agreement by chance.
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
}  # name -> score, and the least value of a sink


@dataclass(frozen=True)
class Transfer:
    """Agreement between layers on which head numbers are sinks.

    rate: share of heads that are sinks. pair_rate: P(head h is a sink in layer b | head h is a sink in layer a), over all a < b.
    pair_chance: the same with random head numbers. first_*: the same where a is the first layer. *_p: share of permutations with
    at least as much agreement. significant_pairs: of testable_pairs, pairs of layers with p < 0.05. None where no head of the
    earlier layers is a sink.
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
    """Test agreement between layers. sinks: bool [layers, heads]. group: query heads per KV head."""
    layers, heads = sinks.shape
    counts = sinks.sum(1).double()
    generator = torch.Generator().manual_seed(seed)
    observed = _overlap(sinks)
    as_many = torch.zeros(layers, layers)  # permutations in which two layers agree at least as often as observed
    pairs, with_first = 0, 0
    upper = torch.triu(torch.ones(layers, layers, dtype=torch.bool), 1)
    for _ in range(0, PERMUTATIONS, AT_ONCE):
        shuffled = _overlap(_permute_heads(sinks, group, AT_ONCE, generator))
        as_many += (shuffled >= observed).sum(0)
        pairs += int((shuffled[:, upper].sum(1) >= observed[upper].sum()).sum())
        with_first += int((shuffled[:, 0, 1:].sum(1) >= observed[0, 1:].sum()).sum())
    chance = counts[:, None] * counts / heads
    following = torch.arange(layers - 1, -1, -1)
    pair_rate, pair_chance, pair_p = _test(
        observed[upper].sum(), chance[upper].sum(), (counts * following).sum(), pairs
    )
    first_rate, first_chance, first_p = _test(
        observed[0, 1:].sum(), chance[0, 1:].sum(), counts[0] * (layers - 1), with_first
    )
    varied = (counts > 0) & (counts < heads)  # otherwise the overlap is constant
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
    """P(head h is a sink in layer b | head h is a sink in layer a): float64 [layers a, layers b], NaN where a has no sinks."""
    overlap = sinks.double() @ sinks.double().T
    return overlap / sinks.sum(1, keepdim=True)


def _permute_heads(sinks: Tensor, group: int, times: int, generator: torch.Generator) -> Tensor:
    """Permute the heads of every layer: bool [times, layers, heads]."""
    layers, heads = sinks.shape
    kv_heads = torch.rand(times, layers, heads // group, generator=generator).argsort(-1)
    query_heads = torch.rand(times, layers, heads // group, group, generator=generator).argsort(-1)
    order = (kv_heads[..., None] * group + query_heads).flatten(2)
    return sinks.expand(times, -1, -1).gather(2, order)


def _overlap(sinks: Tensor) -> Tensor:
    """Number of heads that are sinks in both of two layers: float32 [..., layers, layers]."""
    return sinks.float() @ sinks.float().transpose(-1, -2)


def _test(
    observed: Tensor, expected: Tensor, trials: Tensor, as_many: int
) -> tuple[float | None, float | None, float | None]:
    """Rate, chance rate and permutation p-value (which counts the observed order, so it is never 0)."""
    if not float(trials):
        return None, None, None
    return float(observed) / float(trials), float(expected) / float(trials), (1 + as_many) / (1 + PERMUTATIONS)


def sentence(result: Transfer) -> str:
    """The result in words."""
    if result.first_rate is None:
        first = "no head of the first layer is a sink, so the first layer predicts nothing"
    else:
        first = (
            "if a head is a sink in the first layer, the head of the same number is a sink in a later layer in "
            f"{result.first_rate:.0%} of cases "
            f"(chance {result.first_chance:.0%}, p = {result.first_p:.2g})"
        )
    if result.pair_rate is None:
        return f"By {result.rule}: {first}."
    return (
        f"By {result.rule}: {first}. Over all pairs of layers, this holds for the later layer in "
        f"{result.pair_rate:.0%} of cases (chance {result.pair_chance:.0%}, p = {result.pair_p:.2g})."
    )
