"""The choice of a pattern for every KV head under a budget, by the loss that is measured.

The search starts from 0.7 of the budget, dealt out by how much each head needs its keys to tell a text again
(reconstruction.py), and spends the rest in steps. At every step the replays (replay.py) give the slope of the loss towards every
larger pattern of every head, at the plan reached so far, and a knapsack picks what promises most for the keys that may be spent.
Heads are judged in the company that they will be in: with ten heads full, others are worth something else than with
none. At the end heads are swapped within the budget while the measured loss falls.

Slopes alone promise too much, since outputs move far. What their sum misses is known at one place: with every head full the
loss is 0. So each move is charged with its squared error times the one factor that makes the sum come out right there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headsink.calibration.allocation import allocate
from headsink.calibration.method import SINK, Method
from headsink.calibration.replay import Marginals, Patterns, Replay
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import FULL, Pattern
from headsink.models.distributed import rank_heads

Phase = Literal["forward", "refined", "done"]

START = 0.7  # of the budget is dealt out by need
GROWTH = 1.25  # of what is kept, from step to step
REFINEMENTS = 3  # rounds of swaps within the budget, at most
HALVINGS = 3  # of the number of swaps of a round, where all of them together do not lower the loss


@dataclass(frozen=True)
class Step:
    """A plan on the way. kept: share of the KV entries; loss: measured, of the plan before it while going forward."""

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
    """Patterns for the heads that the replays have, at `context` tokens.

    need: float [layers, KV heads, samples], how much each of some keys is needed (reconstruction.py); heads compete by it.
    """

    def __init__(
        self, replays: Sequence[Replay], context: int, method: Method, seed: int = 0, need: Tensor | None = None
    ):
        self.replays, self.context, self.method, self.seed, self.need = replays, context, method, seed, need
        for replay in replays:
            replay.prefill_compression = method.prefill_compression
        shape = replays[0].shape
        self.layers = [layer for layer, window in enumerate(shape.windows) if window is None]
        self.ranks = list(dict.fromkeys(tuple(heads) for heads in rank_heads(shape.kv_heads, method.ranks)))
        self.heads = [(layer, head) for layer in self.layers for head in self._in_order(layer)]
        self.options = method.options(context)
        self.sizes = torch.tensor([p.size(context) for p in self.options], dtype=torch.float64)

    def _in_order(self, layer: int) -> list[int]:
        """The heads of a layer; of several ranks side by side those that need most, then those that need the next most, ..."""
        if len(self.ranks) == 1 or self.need is None:
            return [head for place in zip(*self.ranks, strict=True) for head in place]
        need = self.need[layer].mean(-1).tolist()
        ranks = [sorted(heads, key=lambda head: -need[head]) for heads in self.ranks]
        return [head for place in zip(*ranks, strict=True) for head in place]

    # plans as rows of a table: int64 [heads], the option of each

    def patterns(self, pick: Tensor) -> list[list[Pattern] | None]:
        rows: list[list[Pattern] | None] = [None] * self.replays[0].shape.layers
        for layer in self.layers:
            rows[layer] = [FULL] * self.replays[0].shape.kv_heads
        for (layer, head), option in zip(self.heads, pick.tolist(), strict=True):
            rows[layer][head] = self.options[option]  # type: ignore[index]
        return rows

    def _rows(self, found: Tensor) -> Tensor:
        """What was found for [layers that do not slide, KV heads, ...], in rows as plans are."""
        return torch.stack([found[self.layers.index(layer), head] for layer, head in self.heads])

    def kept(self, pick: Tensor) -> float:
        return float(self.sizes[pick].sum()) / (self.context * len(self.heads))

    def loss(self, pick: Tensor) -> float:
        return mean_loss(self.replays, self.patterns(pick), self.method.retrieval_weight)

    def run(self, budget: float, done: Sequence[Step] = (), report: Callable[[Step], None] | None = None) -> Step:
        """The plan for `budget`. `done`: steps of an earlier run, to go on from; `report` is called with every step.

        Raises HeadsinkError if even the smallest plan is over the budget.
        """

        def state(pick: Tensor, loss: float, phase: Phase) -> Step:
            step = Step.of(self.patterns(pick), self.kept(pick), loss, phase)
            if report is not None:
                report(step)
            return step

        fixed = self._fixed(budget)
        if fixed is not None:
            return state(fixed, self.loss(fixed), "done")
        everything = torch.full((len(self.heads),), len(self.options) - 1)
        if budget >= 1:
            return state(everything, self.loss(everything), "done")
        if not (self.method.gradient and self.method.steps):
            start = self._start(budget) if self.method.gradient else everything  # errors are taken at the model itself
            pick = self._choose(self.expected(start)[1], budget)
            return state(pick, self.loss(pick), "done")
        last = done[-1] if done else None
        if last is not None and last.phase == "done":
            return last
        pick = self._start(budget) if last is None else self._pick(last)
        while last is None or (last.phase == "forward" and last.kept < budget - 1 / (len(self.heads) * self.context)):
            loss, cost = self.expected(pick)
            own = pick[:, None]
            not_larger = (self.sizes <= self.sizes[own]).scatter(1, own, False)  # than the option that a head has
            # Room for any one move: if none is made there is none that promises anything.
            least = self._together() / len(self.heads)
            allowed = min(budget, max(self.kept(pick) * GROWTH, self.kept(pick) + least))
            better = self._choose(cost.masked_fill(not_larger, float("inf")), allowed)
            if torch.equal(better, pick):
                break
            pick = better
            last = state(pick, loss, "forward")
        loss = self.loss(pick)
        rounds = REFINEMENTS - sum(step.phase == "refined" for step in done)
        for _ in range(rounds if self.method.refine else 0):
            better, lower = self._swapped(pick, loss, budget)
            if lower >= loss:
                break
            pick, loss = better, lower
            state(pick, loss, "refined")
        return state(pick, loss, "done")

    def _swapped(self, pick: Tensor, loss: float, budget: float) -> tuple[Tensor, float]:
        """A better plan within the budget and its measured loss: all swaps that promise something, or the better half, ..."""
        _, cost = self.expected(pick)
        better = self._choose(cost, budget)
        for _ in range(HALVINGS):
            if torch.equal(better, pick):
                break
            lower = self.loss(better)
            if lower < loss:
                return better, lower
            better = self._half_way(pick, better, cost, budget)
        return pick, loss

    def _half_way(self, pick: Tensor, better: Tensor, cost: Tensor, budget: float) -> Tensor:
        """Of the changes from `pick` to `better` the half that promises most, with as many more as pay for the keys it takes."""
        if self._together() > 1:
            return pick  # halves would part heads that go the same way
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
        """The loss of a plan, and the change expected of it: float64 [heads, options], 0 for the options that it has."""
        patterns = self.patterns(pick)
        found = [r.marginals(patterns, self.options, self.method.retrieval_weight) for r in self.replays]
        mean = _mean(found)
        if not (math.isfinite(mean.loss) and mean.gradient.isfinite().all()):
            raise HeadsinkError("the model's loss is not finite here; try --dtype float32 or bfloat16")
        gradient, error = (self._rows(t[self.layers]).double() for t in (mean.gradient, mean.error))
        if not self.method.gradient:
            return mean.loss, error
        if not self.method.correction:
            return mean.loss, gradient
        # Every head full: the loss is gone. Full attention is the last option.
        missed = -mean.loss - float(gradient[:, -1].sum())
        return mean.loss, gradient + max(missed, 0.0) / max(float(error[:, -1].sum()), 1e-12) * error

    # starts and fixed plans

    def _start(self, budget: float) -> Tensor:
        smallest = int(self.sizes.argmin())
        least = float(self.sizes[smallest]) / self.context
        check_room(budget, self.context, least)
        if self.need is None or not self.method.need or self.method.policy != "headsink" or least >= START * budget:
            return torch.full((len(self.heads),), smallest)
        share = allocate(self.need[self.layers], START * budget - least)
        wanted = (self._rows(share) + least)[:, None] * self.context
        # Squares, so that no head goes without for the sake of another that has most of what it needs.
        missing = (wanted - self.sizes).clamp(min=0).square() / wanted
        return self._choose(missing, START * budget)

    def _fixed(self, budget: float) -> Tensor | None:
        """Plans that nothing is measured for."""
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
            marginals = [r.marginals(self.patterns(pick), self.options, 0.0) for r in self.replays]
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

    def _together(self) -> int:
        """How many heads, one after the other, go the same way: all of a layer, one of each rank, or each by itself."""
        return len(self.heads) // len(self.layers) if self.method.policy == "layer-wise" else len(self.ranks)

    def _choose(self, cost: Tensor, budget: float) -> Tensor:
        tied = self._together()
        cost = cost.view(-1, tied, cost.shape[1]).sum(1)
        return choose(cost, self.sizes * tied, budget * self.context * len(self.heads)).repeat_interleave(tied)


def mean_loss(replays: Sequence[Replay], patterns: Patterns, retrieval_weight: float) -> float:
    """The loss of a plan, as it is measured: the mean over the replays."""
    return sum(float(r.loss(r.log_probs(patterns), retrieval_weight)) for r in replays) / len(replays)


def check_room(budget: float, context: int, least: float) -> None:
    if least > budget:
        raise HeadsinkError(f"budget: {budget} of {context} tokens is less than the smallest plan, {least:.3f}")


def choose(cost: Tensor, sizes: Tensor, allowed: float) -> Tensor:
    """The option of every row with the least total cost whose sizes fit: int64 [rows].

    cost: float64 [rows, options]; sizes: float64 [options]. A Lagrangian knapsack: every row takes the option of least cost +
    price x size; the price is the lowest one at which all fit. What is left goes to the best single improvements. Raises
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


def _mean(found: Sequence[Marginals]) -> Marginals:
    return Marginals(
        sum(m.loss for m in found) / len(found),
        torch.stack([m.gradient for m in found]).mean(0),
        torch.stack([m.error for m in found]).mean(0),
    )
