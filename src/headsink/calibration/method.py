"""`Method`: how the patterns of a plan are chosen. Does not import torch, since the command line's help needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from headsink.errors import HeadsinkError

if TYPE_CHECKING:
    from headsink.plan.schema import Positions

Policy = Literal["headsink", "streaming-llm", "on-off", "layer-wise", "copy-first-layer", "random"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
BY_HEAD: tuple[Policy, ...] = ("headsink", "streaming-llm", "on-off", "layer-wise")  # work with several ranks


@dataclass(frozen=True)
class Method:
    """How patterns are chosen.

    policy: "headsink", or the form of another method: "streaming-llm" (one window for all heads, arXiv 2309.17453), "on-off"
    (each head is full or has one fixed window, as in DuoAttention, arXiv 2410.10819), "layer-wise" (the same per layer, as in
    SimLayerKV, arXiv 2410.13846), "copy-first-layer" (the same heads in all layers, chosen by the first layer's errors), "random"
    (on-off with random heads). top_k: if off, the policy headsink gives windows of several sizes and no top-k keys, which
    vLLM can serve. importance: if off, all heads get the same number of top-k keys, for ablations.

    positions, scorer: as in a plan; "cache-relative" only works with windows. ranks: number of tensor-parallel ranks. Every rank
    reserves as much memory as the fullest one, so heads at the same index of different ranks get the same pattern.

    Raises HeadsinkError for an unknown policy and for options that exclude each other.
    """

    policy: Policy = "headsink"
    top_k: bool = True
    importance: bool = True
    positions: Positions = "absolute"
    scorer: str = "linear"
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise HeadsinkError(f"policy: {self.policy!r} is unknown; one of {', '.join(POLICIES)}")
        if self.ranks < 1 or (self.ranks > 1 and (self.allocates or self.policy not in BY_HEAD)):
            raise HeadsinkError(
                f"tensor-parallel: {self.ranks} ranks; at least 1, and more than 1 only without top-k keys (--no-top-k) or with "
                "the policies streaming-llm, on-off and layer-wise"
            )
        if self.positions == "cache-relative" and self.policy != "streaming-llm":
            raise HeadsinkError("positions: cache-relative positions need the policy streaming-llm")

    @property
    def allocates(self) -> bool:
        """Whether head budgets are allocated by importance (allocation.py), not patterns chosen by errors (policies.py)."""
        return self.policy == "headsink" and self.top_k
