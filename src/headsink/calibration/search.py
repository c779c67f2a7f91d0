"""Local search for the pattern of every KV head under a budget, on the measured loss.

The search starts from 0.7 of the budget, allocated by the importance scores of context reconstruction
(compression/reconstruction.py), and spends the rest in steps. At every step the cached documents (cached_document.py) give the
gradient of the loss towards every larger pattern of every head at the current plan, and a knapsack picks the patterns with the
largest expected gain for the next keys. Gradients are measured again at every step, because the gain of a head depends on the
patterns of the others. At the end patterns are swapped within the budget while the measured loss decreases.

Gradients alone overestimate gains, since outputs change a lot. The sum of gains is known in one case: with every head full the
loss is 0. So each change is charged with its squared error, times the factor that makes the sum correct in that case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headsink.calibration.allocation import allocate
from headsink.calibration.cached_document import CachedDocument, Marginals, Patterns
from headsink.calibration.method import SINK, Method
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import FULL, Pattern
from headsink.models.distributed import rank_heads

Phase = Literal["forward", "refined", "done"]

START = 0.7  # share of the budget that is allocated by importance
GROWTH = 1.25  # factor on the kept keys from step to step
REFINEMENTS = 3  # rounds of swaps within the budget, at most
HALVINGS = 3  # how often the swaps of a round are halved if they do not lower the loss


@dataclass(frozen=True)
class Step:
    """A step of the search. kept: share of the KV entries. loss: measured; in the phase "forward" that of the plan before."""

    phase: Phase
    kept: float
    loss: float
    patterns: tuple[tuple[tuple[int, int, int | None], ...] | None, ...]  # sink, top_k, window

    @classmethod
    def of(cls, patterns: Patterns, kept: float, loss: float, phase: Phase) -> Step:
        rows = tuple(None if row is None else tuple((p.sink, p.top_k, p.window) for p in row) for row in patterns)
        return cls(phase, kept, loss, rows)

    def plan(self) -> list[list[Pattern] | None]:
        return [None if row is None else [Pattern(*numbers) for numbers in row] for row in self.patterns]


class Search:
    """Search for the patterns of a model's KV heads, at `context` tokens.

    importance: importance scores of some keys, float [layers, KV heads, samples] (compression/reconstruction.py), by which heads
    compete for the first part of the budget.
    """

    def __init__(
        self,
        documents: Sequence[CachedDocument],
        context: int,
        method: Method,
        seed: int = 0,
        importance: Tensor | None = None,
    ):
        self.cached, self.context, self.method, self.seed, self.importance = (
            documents,
            context,
            method,
            seed,
            importance,
        )
        for cached in documents:
            cached.prefill_compression = method.prefill_compression
        shape = documents[0].shape
        self.layers = [layer for layer, window in enumerate(shape.windows) if window is None]
        self.ranks = list(dict.fromkeys(tuple(heads) for heads in rank_heads(shape.kv_heads, method.ranks)))
        self.heads = [(layer, head) for layer in self.layers for head in self._head_order(layer)]
        self.options = method.options(context)
        self.sizes = torch.tensor([p.size(context) for p in self.options], dtype=torch.float64)

    def _head_order(self, layer: int) -> list[int]:
        """The heads of a layer. With several ranks: the most important head of each rank, then the next of each, ..."""
        if len(self.ranks) == 1 or self.importance is None:
            return [head for tied in zip(*self.ranks, strict=True) for head in tied]
        importance = self.importance[layer].mean(-1).tolist()
        ranks = [sorted(heads, key=lambda head: -importance[head]) for heads in self.ranks]
        return [head for tied in zip(*ranks, strict=True) for head in tied]

    # a plan is an int64 [heads] tensor here, the option of each head

    def patterns(self, pick: Tensor) -> list[list[Pattern] | None]:
        rows: list[list[Pattern] | None] = [None] * self.cached[0].shape.layers
        for layer in self.layers:
            rows[layer] = [FULL] * self.cached[0].shape.kv_heads
        for (layer, head), option in zip(self.heads, pick.tolist(), strict=True):
            rows[layer][head] = self.options[option]  # type: ignore[index]
        return rows

    def _rows(self, values: Tensor) -> Tensor:
        """Reorder [layers without a sliding window, KV heads, ...] to [heads, ...], in the order of plans."""
        return torch.stack([values[self.layers.index(layer), head] for layer, head in self.heads])

    def kv_budget(self, pick: Tensor) -> float:
        return float(self.sizes[pick].sum()) / (self.context * len(self.heads))

    def loss(self, pick: Tensor) -> float:
        return mean_loss(self.cached, self.patterns(pick), self.method.retrieval_weight)

    def run(self, budget: float, done: Sequence[Step] = (), report: Callable[[Step], None] | None = None) -> Step:
        """The plan for `budget`. done: steps of an earlier run to continue from. report: called with every step.

        Raises HeadsinkError if even the smallest plan is over the budget.
        """

        def state(pick: Tensor, loss: float, phase: Phase) -> Step:
            step = Step.of(self.patterns(pick), self.kv_budget(pick), loss, phase)
            if report is not None:
                report(step)
            return step

        fixed = self._fixed(budget)
        if fixed is not None:
            return state(fixed, self.loss(fixed), "done")
        full = torch.full((len(self.heads),), len(self.options) - 1)
        if budget >= 1:
            return state(full, self.loss(full), "done")
        if not (self.method.gradient and self.method.steps):
            start = self._start(budget) if self.method.gradient else full  # errors are measured at the full cache
            pick = self._choose(self.expected(start)[1], budget)
            return state(pick, self.loss(pick), "done")
        last = done[-1] if done else None
        if last is not None and last.phase == "done":
            return last
        pick = self._start(budget) if last is None else self._pick(last)
        while last is None or (last.phase == "forward" and last.kept < budget - 1 / (len(self.heads) * self.context)):
            loss, cost = self.expected(pick)
            own = pick[:, None]
            not_larger = (self.sizes <= self.sizes[own]).scatter(1, own, False)  # than the head's current option
            # There is room for any single change, so if none is made, none has an expected gain.
            least = self._tied_heads() / len(self.heads)
            allowed = min(budget, max(self.kv_budget(pick) * GROWTH, self.kv_budget(pick) + least))
            better = self._choose(cost.masked_fill(not_larger, float("inf")), allowed)
            if torch.equal(better, pick):
                break
            pick = better
            last = state(pick, loss, "forward")
        loss = self.loss(pick)
        rounds = REFINEMENTS - sum(step.phase == "refined" for step in done)
        for _ in range(rounds if self.method.refine else 0):
            better, lower = self._swap(pick, loss, budget)
            if lower >= loss:
                break
            pick, loss = better, lower
            state(pick, loss, "refined")
        return state(pick, loss, "done")

    def _swap(self, pick: Tensor, loss: float, budget: float) -> tuple[Tensor, float]:
        """A better plan within the budget and its measured loss: all swaps with an expected gain, or the better half, ..."""
        _, cost = self.expected(pick)
        better = self._choose(cost, budget)
        for _ in range(HALVINGS):
            if torch.equal(better, pick):
                break
            lower = self.loss(better)
            if lower < loss:
                return better, lower
            better = self._halve_swaps(pick, better, cost, budget)
        return pick, loss

    def _halve_swaps(self, pick: Tensor, better: Tensor, cost: Tensor, budget: float) -> Tensor:
        """Apply the better half of the changes from `pick` to `better`, and as many more as are needed to stay in the budget."""
        if self._tied_heads() > 1:
            return pick  # half of the changes would separate tied heads
        changed = (pick != better).nonzero()[:, 0]
        order = changed[cost[changed, better[changed]].argsort()]
        half, allowed = pick.clone(), budget * self.context * len(self.heads)
        taken = order[: max(1, len(order) // 2)]
        half[taken] = better[taken]
        for row in order[len(taken) :].tolist():
            if self.sizes[half].sum() <= allowed:
                break
            if self.sizes[better[row]] < self.sizes[pick[row]]:
                half[row] = better[row]
        return half if self.sizes[half].sum() <= allowed else pick

    def expected(self, pick: Tensor) -> tuple[float, Tensor]:
        """The loss of a plan, and its expected change for each option: float64 [heads, options], 0 for the current ones."""
        patterns = self.patterns(pick)
        marginals = [r.marginals(patterns, self.options, self.method.retrieval_weight) for r in self.cached]
        mean = _mean(marginals)
        if not (math.isfinite(mean.loss) and mean.gradient.isfinite().all()):
            raise HeadsinkError("the model's loss is not finite here; try --dtype float32 or bfloat16")
        gradient, error = (self._rows(t[self.layers]).double() for t in (mean.gradient, mean.error))
        if not self.method.gradient:
            return mean.loss, error
        if not self.method.correction:
            return mean.loss, gradient
        # With every head full (the last option) the loss is 0.
        missed = -mean.loss - float(gradient[:, -1].sum())
        return mean.loss, gradient + max(missed, 0.0) / max(float(error[:, -1].sum()), 1e-12) * error

    # starts and fixed plans

    def _start(self, budget: float) -> Tensor:
        smallest = int(self.sizes.argmin())
        least = float(self.sizes[smallest]) / self.context
        check_room(budget, self.context, least)
        if (
            self.importance is None
            or not self.method.importance
            or self.method.policy != "headsink"
            or least >= START * budget
        ):
            return torch.full((len(self.heads),), smallest)
        share = allocate(self.importance[self.layers], START * budget - least)
        wanted = (self._rows(share) + least)[:, None] * self.context
        # Squared, so that every head gets some of its keys before others get all of theirs.
        missing = (wanted - self.sizes).clamp(min=0).square() / wanted
        return self._choose(missing, START * budget)

    def _fixed(self, budget: float) -> Tensor | None:
        """The plan of a policy that needs no search; None for the others."""
        if self.method.policy == "streaming-llm":
            window = int(budget * self.context) - SINK
            if window < 1:
                raise HeadsinkError(f"budget: {budget} of {self.context} tokens leaves no window")
            full = window + SINK >= self.context and self.method.positions == "absolute"
            self.options = (FULL if full else Pattern(SINK, 0, window),)
            self.sizes = torch.tensor([self.options[0].size(self.context)], dtype=torch.float64)
            return torch.zeros(len(self.heads), dtype=torch.long)
        if self.method.policy == "copy-first-layer":
            pick = torch.full((len(self.heads),), len(self.options) - 1)
            marginals = [r.marginals(self.patterns(pick), self.options, 0.0) for r in self.cached]
            error = _mean(marginals).error[self.layers[0]].double()
            heads = choose(
                error * len(self.layers), self.sizes * len(self.layers), budget * self.context * len(self.heads)
            )
            return heads.repeat(len(self.layers))
        if self.method.policy == "random":
            order = torch.randperm(len(self.heads), generator=torch.Generator().manual_seed(self.seed))
            cost = torch.zeros(len(self.heads), 2, dtype=torch.float64)
            cost[order, 0] = torch.arange(1, len(self.heads) + 1, dtype=torch.float64)
            return self._choose(cost, budget)
        return None

    def _pick(self, step: Step) -> Tensor:
        plan = step.plan()
        return torch.tensor([self.options.index(plan[layer][head]) for layer, head in self.heads])  # type: ignore[index]

    def _tied_heads(self) -> int:
        """Number of consecutive heads that get the same option: all of a layer, one of each rank, or 1."""
        return len(self.heads) // len(self.layers) if self.method.policy == "layer-wise" else len(self.ranks)

    def _choose(self, cost: Tensor, budget: float) -> Tensor:
        tied = self._tied_heads()
        cost = cost.view(-1, tied, cost.shape[1]).sum(1)
        return choose(cost, self.sizes * tied, budget * self.context * len(self.heads)).repeat_interleave(tied)


def mean_loss(documents: Sequence[CachedDocument], patterns: Patterns, retrieval_weight: float) -> float:
    """The measured loss of a plan, mean over the cached documents."""
    return sum(float(r.loss(r.log_probs(patterns), retrieval_weight)) for r in documents) / len(documents)


def check_room(budget: float, context: int, least: float) -> None:
    if least > budget:
        raise HeadsinkError(f"budget: {budget} of {context} tokens is less than the smallest plan, {least:.3f}")


def choose(cost: Tensor, sizes: Tensor, allowed: float) -> Tensor:
    """Choose an option for every row to minimise the total cost within the total size `allowed`: int64 [rows].

    cost: float64 [rows, options]; sizes: float64 [options]. A Lagrangian knapsack: every row takes the option with the least
    cost + price x size, at the lowest price at which all fit. The remaining size goes to the best single improvements. Raises
    HeadsinkError if nothing fits.
    """
    if sizes.min() * len(cost) > allowed:
        raise HeadsinkError(
            f"budget: {allowed:.0f} keys are less than the smallest plan, {sizes.min() * len(cost):.0f}"
        )
    low, high = 0.0, 1e-9
    while sizes[_cheapest(cost, sizes, high)].sum() > allowed:
        high *= 4
    for _ in range(80):
        price = (low + high) / 2
        low, high = (price, high) if sizes[_cheapest(cost, sizes, price)].sum() > allowed else (low, price)
    pick = _cheapest(cost, sizes, high)
    while True:
        left = allowed - sizes[pick].sum()
        gain = cost.gather(1, pick[:, None]) - cost
        growth = sizes - sizes[pick][:, None]
        worth = torch.where((gain > 0) & (growth <= left), gain / growth.clamp(min=1e-9), 0.0)
        if not worth.max() > 0:
            return pick
        row, option = divmod(int(worth.argmax()), cost.shape[1])
        pick[row] = option


def _cheapest(cost: Tensor, sizes: Tensor, price: float) -> Tensor:
    return (cost + price * sizes).argmin(1)


def _mean(marginals: Sequence[Marginals]) -> Marginals:
    return Marginals(
        sum(m.loss for m in marginals) / len(marginals),
        torch.stack([m.gradient for m in marginals]).mean(0),
        torch.stack([m.error for m in marginals]).mean(0),
    )
