"""How a plan is made: the policies and the switches of a search. Light: the command line's help needs it, without torch."""

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
ON_OFF = (64, 0, 256)  # what DuoAttention (arXiv 2410.10819) gives a streaming head


@dataclass(frozen=True)
class Method:
    """How patterns are chosen. The switches turn parts of the method off, to see what each is worth.

    policy: "headsink", or the shape of another method: "streaming-llm" (one window for all, arXiv 2309.17453), "on-off" (heads
    are full or have one fixed window, DuoAttention's shape), "layer-wise" (layers are, SimLayerKV's shape, arXiv 2410.13846),
    "copy-first-layer" (heads are the same in all layers, as the first layer's errors say), "random" (as on-off, drawn by lot).
    windows: in tokens; top_k: top-k keys as shares of the context; a head gets one of each, or full attention. need: start
    from what reconstruction needs, not from nothing. gradient: slopes of the loss, not squared errors of outputs. steps: look
    again after every step, not once. correction: charge what the sum of slopes misses. refine: swap heads at the end.
    retrieval_weight: KL of answers against that of text. once: the plan is for contexts that are compressed once.
    reconstruct: and are told again before; then numbers are dealt by need (all heads have the same without) and refined
    where heads are few (dealing.py). refit_values: and values make up for the keys that go. positions: as in a plan; "cache"
    is for windows only. ranks: of tensor parallelism, in which every rank reserves what the fullest one takes; so heads in
    the same place of different ranks go the same way.
    """

    policy: Policy = "headsink"
    windows: tuple[int, ...] = WINDOWS
    top_k: tuple[float, ...] = TOP_K
    need: bool = True
    gradient: bool = True
    steps: bool = True
    correction: bool = True
    refine: bool = True
    retrieval_weight: float = 0.25
    prefill_compression: bool = False
    reconstruct: bool = False
    refit_values: bool = True
    positions: Positions = "absolute"
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise HeadsinkError(f"policy: {self.policy!r} is unknown; one of {', '.join(POLICIES)}")
        if self.reconstruct and not (self.prefill_compression and self.policy == "headsink"):
            raise HeadsinkError("reconstruct: contexts that are compressed once are told again, by our own policy only")
        if self.ranks < 1 or (self.ranks > 1 and (self.reconstruct or self.policy in ("copy-first-layer", "random"))):
            raise HeadsinkError(
                f"tensor-parallel: {self.ranks} ranks; at least 1, and more neither with --reconstruct nor with the policies "
                "copy-first-layer and random, which do not choose heads one by one"
            )
        if self.positions == "cache-relative" and (self.policy != "streaming-llm" or self.prefill_compression):
            raise HeadsinkError(
                "positions: only windows can count them in the cache; use the policy streaming-llm, which lets go all the time"
            )

    def options(self, context: int) -> tuple[Pattern, ...]:
        """The patterns that a head may get, full attention last."""
        from headsink.eviction.pattern import (
            FULL,
            Pattern,  # which import torch
        )

        if self.policy in ("on-off", "layer-wise", "copy-first-layer", "random"):
            return (Pattern(*ON_OFF), FULL)
        patterns = [Pattern(SINK, round(f * context), window) for f in self.top_k for window in self.windows]
        return (*dict.fromkeys(p for p in patterns if p.size(context) < context), FULL)
