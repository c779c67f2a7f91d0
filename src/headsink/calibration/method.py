"""`Method`: policies and options of the search for a plan. Does not import torch, since the command line's help needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from headsink.errors import HeadsinkError

if TYPE_CHECKING:
    from headsink.eviction.pattern import Pattern
    from headsink.plan.schema import Positions


Policy = Literal["headsink", "streaming-llm", "on-off", "layer-wise", "copy-first-layer", "random"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

SINK = 4
WINDOWS = (32,)
SEVERAL_WINDOWS = (32, 128, 512, 2048)  # for plans without top-k keys
TOP_K = (0, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the context
ON_OFF = (64, 0, 256)  # pattern of a streaming head in DuoAttention (arXiv 2410.10819)


@dataclass(frozen=True)
class Method:
    """How patterns are chosen. The boolean options turn parts of the method off, for ablations.

    policy: "headsink", or the form of another method: "streaming-llm" (one window for all heads, arXiv 2309.17453), "on-off"
    (each head is full or has one fixed window, as in DuoAttention, arXiv 2410.10819), "layer-wise" (the same per layer, as in
    SimLayerKV, arXiv 2410.13846), "copy-first-layer" (the same heads in all layers, chosen by the first layer's errors), "random"
    (on-off with random heads). windows: sizes in tokens. top_k: numbers of top-k keys as shares of the context. A head gets one
    of each, or full attention. importance: start the search from importance scores, not from the smallest plan. gradient: use
    gradients of the loss, not squared output errors. steps: measure again after every step, not once. correction: correct the
    sum of gradients by squared errors. refine: local search by swaps at the end. retrieval_weight: weight of the KL of answers
    relative to that of text.

    prefill_compression: calibrate for prefill compression, not for online eviction. reconstruct: with context reconstruction
    (KVzip); head budgets are then proportional to importance (equal if `importance` is off) and refined by coordinate descent if
    there are few heads (allocation.py). refit_values: refit the kept values (least squares). positions, scorer: as in a plan;
    "cache-relative" only works with windows. ranks: number of tensor-parallel ranks. Every rank reserves as much memory as the
    fullest one, so heads at the same index of different ranks get the same pattern.
    """

    policy: Policy = "headsink"
    windows: tuple[int, ...] = WINDOWS
    top_k: tuple[float, ...] = TOP_K
    importance: bool = True
    gradient: bool = True
    steps: bool = True
    correction: bool = True
    refine: bool = True
    retrieval_weight: float = 0.25
    prefill_compression: bool = False
    reconstruct: bool = False
    refit_values: bool = True
    positions: Positions = "absolute"
    scorer: str = "linear"
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise HeadsinkError(f"policy: {self.policy!r} is unknown; one of {', '.join(POLICIES)}")
        if self.reconstruct and not (self.prefill_compression and self.policy == "headsink"):
            raise HeadsinkError("reconstruct: it needs prefill_compression and the policy headsink")
        if self.ranks < 1 or (self.ranks > 1 and (self.reconstruct or self.policy in ("copy-first-layer", "random"))):
            raise HeadsinkError(
                f"tensor-parallel: {self.ranks} ranks; at least 1, and only 1 with --reconstruct or the policies "
                "copy-first-layer and random, which do not choose heads one by one"
            )
        if self.positions == "cache-relative" and (self.policy != "streaming-llm" or self.prefill_compression):
            raise HeadsinkError(
                "positions: cache-relative positions need the policy streaming-llm without prefill compression"
            )

    def options(self, context: int) -> tuple[Pattern, ...]:
        """The patterns that a head may get; full attention is the last."""
        from headsink.eviction.pattern import (
            FULL,
            Pattern,  # which import torch
        )

        if self.policy in ("on-off", "layer-wise", "copy-first-layer", "random"):
            return (Pattern(*ON_OFF), FULL)
        patterns = [Pattern(SINK, round(f * context), window) for f in self.top_k for window in self.windows]
        return (*dict.fromkeys(p for p in patterns if p.size(context) < context), FULL)
