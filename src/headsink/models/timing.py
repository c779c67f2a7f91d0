"""Estimate how long a census or a calibration will take, from timed short forward passes."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from headsink.models.distributed import input_device
from headsink.models.spec import describe
from headsink.utils.terminal import note

ENOUGH = 0.3  # seconds; a pass that takes as long is timed
SHORTEST, LONGEST = 32, 2048  # tokens of a timed pass
CENSUS = (
    1.5  # cost of a census token relative to a token of a short pass: 1.1 at 1,024 tokens (SmolLM2, CPU), more at 4,096
)
# Cost of a calibration per token of its context, and of the contexts at which quality is measured, relative to a token of a short
# pass: 17 at 2,000 tokens, 10 at 7,500 (SmolLM2, CPU).
PLAN = 20.0


def seconds_per_token(model: PreTrainedModel) -> float:
    """Return the seconds per prompt token, after a warm-up. Passes double in length until one takes long enough."""
    most = min(LONGEST, describe(model).max_context)
    tokens = min(SHORTEST, most)
    _seconds(model, tokens)
    while (seconds := _seconds(model, tokens)) < ENOUGH and tokens < most:
        tokens = min(2 * tokens, most)
    return seconds / tokens


def _seconds(model: PreTrainedModel, tokens: int) -> float:
    """Time one forward pass over a prompt."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=input_device(model))
    start = time.perf_counter()
    with torch.no_grad():
        float(model(ids, use_cache=False, logits_to_keep=1).logits.sum())  # waits for a GPU
    return time.perf_counter() - start


def print_estimate(what: str, model: PreTrainedModel, tokens: float, factor: float) -> None:
    """Print an estimate of the time for `tokens` tokens, each of which costs `factor` prompt tokens, to standard error."""
    note(f"{what}: {format_duration(factor * tokens * seconds_per_token(model))}")


def format_duration(seconds: float) -> str:
    """Return a rough duration, such as "about 3 minutes"."""
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} minute{'s' if minutes > 1 else ''}"
    return f"about {seconds / 3600:.1f} hours"
