"""The parts of a plan file: a head's pattern, and what quality was measured."""

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
    """The pattern of one KV head, and the weights of its keys' scores (scores.py), by which top-k keys are chosen."""

    sink: Tokens = 0
    top_k: Tokens = 0
    window: Tokens | None
    scorer_weights: tuple[Weight, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.window is None and (self.sink or self.top_k):
            raise ValueError("full attention (window null) sees every key, so sink and top_k must be 0")
        if self.top_k and not any(self.scorer_weights or ()):
            raise ValueError("top-k keys need a score to be chosen by, and not all of its weights can be 0")
        return self

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.sink, self.top_k, self.window)


class Retrieval(Part):
    """Questions of one form about documents: how many were asked, and how many the model itself and the plan got right.

    `nll_*` is the mean negative log-likelihood of the answers, in nats per token.
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
            raise ValueError(f"{right} right of {info.data['asked']} asked")
        return right


class Quality(Part):
    """What a plan was measured to cost on held-out texts of `context` tokens: the last `positions` of `documents` texts.

    `kl` is KL(full || plan) of the next-token distributions in nats, `top1` the share of positions with the same most likely
    token, `nll_*` the mean negative log-likelihood of the text in nats per token, `kv_bytes` what the cache held. Intervals are
    95 % (quality.py).
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
        """Questions of all forms."""
        return sum(r.asked for r in self.retrieval)

    @property
    def right_full(self) -> int:
        return sum(r.right_full for r in self.retrieval)

    @property
    def right_plan(self) -> int:
        return sum(r.right_plan for r in self.retrieval)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name may stand twice: readers of JSON disagree on which of the two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{harmless(twice)} is there twice in one object")
    return found
