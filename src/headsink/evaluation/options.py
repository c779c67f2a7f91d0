"""Options for making and measuring a plan and for ablations, and checks that need no model. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from headsink.data.documents import LEAST_LENGTH
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import Pattern

TAIL = 160  # tokens after a calibration document at most; both together fit into the longest context
LEAST_CONTEXT = LEAST_LENGTH + TAIL
CONTINUATION = 256  # tokens after a document on which quality is measured
LEAST_QUALITY = 2 * CONTINUATION  # shortest context at which quality is measured, in tokens
FRONTIER_BUDGETS = (0.1, 0.15, 0.25, 0.35, 0.5, 0.75)
FRONTIER = "frontier.json"  # a folder with this file is a frontier


def check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise HeadsinkError(f"budget: {budget} is outside (0, 1]; 0.25 keeps a quarter of the KV cache")


def check_max_kl(max_kl: float, name: str = "max_kl") -> None:
    """Raise for a KL that is not positive. name: of the argument or option."""
    if not max_kl > 0:
        raise HeadsinkError(f"{name}: {max_kl} is not above 0 nats per token; try 0.02")


def check_context(shortest: int, longest: int, most: int | None = None) -> None:
    """Raise for a context that is too short or too long to calibrate for. most: the model's maximum, if it is known."""
    right = f"give {LEAST_CONTEXT} or more" if most is None else f"give {LEAST_CONTEXT} to {most}"
    if shortest > longest:
        raise HeadsinkError(f"context: {shortest} to {longest} is not a range; give the shorter length first")
    if shortest < LEAST_CONTEXT:
        raise HeadsinkError(
            f"context: {shortest} tokens are too few: a plan is calibrated on documents of {LEAST_LENGTH} tokens or more, "
            f"followed by up to {TAIL}; {right}"
        )
    if most is not None and longest > most:
        raise HeadsinkError(f"context: {longest} is over the model's maximum of {most} tokens; {right}")


def check_quality(contexts: Sequence[int], most: int | None = None, name: str = "quality_contexts") -> None:
    """Raise for a context that is too short or too long to measure quality at. most: the model's maximum, if it is known."""
    right = f"give {LEAST_QUALITY} or more" if most is None else f"give {LEAST_QUALITY} to {most}"
    for context in contexts:
        if context < LEAST_QUALITY:
            raise HeadsinkError(
                f"{name}: {context} tokens are too few: quality is measured on {CONTINUATION} tokens after a document of the "
                f"same length or longer; {right}"
            )
        if most is not None and context > most:
            raise HeadsinkError(f"{name}: {context} is over the model's maximum of {most} tokens; {right}")


NULLS = ("layers", "all")  # where the random heads of an ablation are drawn from
DRAWS = 19  # random sets of heads; the smallest p of 19 is 0.05
MEAN = "mean"  # in place of a pattern: each head's mean output
ABLATION_CONTEXT = 1024  # tokens


def head_names(text: str) -> list[tuple[int, int | None]]:
    """Read "3.2,5.*" as pairs of layer and head, None for all heads of the layer."""
    found = []
    for name in (part.strip() for part in text.split(",")):
        parts = re.fullmatch(r"(\d{1,9})\.(\d{1,9}|\*)", name)
        if parts is None:
            raise HeadsinkError(f"heads: {name!r} is not LAYER.HEAD; give heads such as 3.2,5.* (* is every head)")
        found.append((int(parts[1]), None if parts[2] == "*" else int(parts[2])))
    return found


def head_pattern(text: str) -> Pattern | Literal["mean"]:
    """Read the pattern of an ablation: as `Pattern.parse`, or "mean"."""
    return "mean" if text == MEAN else Pattern.parse(text)


def check_null(null: str, draws: int) -> None:
    if null not in NULLS:
        raise HeadsinkError(f"null: {null!r} is unknown; one of {', '.join(NULLS)}")
    if draws < 0:
        raise HeadsinkError(f"draws: {draws} is too few; give 0 or more")
