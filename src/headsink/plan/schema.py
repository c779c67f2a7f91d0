"""The schema of a plan file: a head's pattern, and the measured quality."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from headsink.eviction.pattern import Pattern
from headsink.models.fingerprint import Part
from headsink.utils.format import harmless

Fraction = Annotated[float, Field(ge=0, le=1)]


Tokens = Annotated[int, Field(ge=0, strict=True)]


Positions = Literal["absolute", "cache-relative"]


Finite = Annotated[float, Field(allow_inf_nan=False)]


LARGEST = torch.finfo(torch.float32).max


Weight = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"{interval[0]} is above {interval[1]}")
    return interval


Interval = Annotated[tuple[Finite, Finite], AfterValidator(_ordered)]  # low, high


class Head(Part):
    """The pattern of one KV head, and the scorer weights that choose its top-k keys (eviction/scorers)."""

    sink: Tokens = 0
    top_k: Tokens = 0
    window: Tokens | None
    scorer_weights: tuple[Weight, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.window is None and (self.sink or self.top_k):
            raise ValueError("full attention (window null) sees every key, so sink and top_k must be 0")
        if self.top_k and not any(self.scorer_weights or ()):
            raise ValueError("top-k keys need scorer_weights that are not all 0")
        return self

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.sink, self.top_k, self.window)


class Retrieval(Part):
    """Retrieval accuracy on questions of one form.

    `asked`: number of questions. `right_*`: number of correct answers with the full cache and with the plan. `nll_*`: mean
    negative log-likelihood of the answers, nats per token.
    """

    form: str
    asked: Annotated[int, Field(gt=0)]
    right_full: Tokens
    right_plan: Tokens
    nll_full: Finite
    nll_plan: Finite

    @field_validator("right_full", "right_plan")
    @classmethod
    def _at_most_all(cls, right: int, info: ValidationInfo) -> int:
        if right > info.data.get("asked", right):
            raise ValueError(f"{right} correct answers to {info.data['asked']} questions")
        return right


class Quality(Part):
    """The quality of a plan on the last `positions` tokens of `documents` held-out texts of `context` tokens.

    `kl`: KL(full || plan) of the next-token distributions, nats. `top1`: share of positions with the same most likely token.
    `nll_*`: mean negative log-likelihood of the text, nats per token. `kv_bytes`: size of the cache. Intervals are 95 %
    (evaluation/quality.py).
    """

    context: Annotated[int, Field(gt=0)]
    documents: Annotated[int, Field(gt=0)]
    positions: Annotated[int, Field(gt=0)]
    kl: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    kl_interval: Interval
    top1: Fraction
    top1_interval: Interval
    nll_full: Finite
    nll_plan: Finite
    nll_change_interval: Interval
    retrieval: tuple[Retrieval, ...]
    kv_bytes: Annotated[int, Field(gt=0)]
    kv_bytes_full: Annotated[int, Field(gt=0)]

    @property
    def nll_change(self) -> float:
        return self.nll_plan - self.nll_full

    @property
    def asked(self) -> int:
        """The number of questions of all forms."""
        return sum(r.asked for r in self.retrieval)

    @property
    def right_full(self) -> int:
        return sum(r.right_full for r in self.retrieval)

    @property
    def right_plan(self) -> int:
        return sum(r.right_plan for r in self.retrieval)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its pairs. Raises ValueError for a duplicate name, which JSON readers treat differently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        duplicate = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{harmless(duplicate)} is there twice in one object")
    return found
