"""How long a census or a plan will take: short forward passes are timed on this machine and scaled by the tokens to come."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from headsink.sharding import input_device
from headsink.terminal import note

ENOUGH = 0.3  # seconds of a pass that is long enough to be timed
SHORTEST, LONGEST = 32, 2048  # tokens of such a pass
CENSUS = 1.5  # seconds of a census for each second of plain passes over its texts (SmolLM2, 512 tokens, CPU)
PLAN = 250.0  # seconds of a plan for each second of a plain pass over its context (SmolLM2, 416 tokens, CPU)


def seconds_per_token(model: PreTrainedModel) -> float:
    """Seconds that a token of a prompt takes. Passes double in length, so that the first ones warm up the last."""
    tokens, most = SHORTEST, min(LONGEST, model.config.get_text_config(decoder=True).max_position_embeddings)
    while True:
        ids = torch.zeros(1, min(tokens, most), dtype=torch.int64, device=input_device(model))
        start = time.perf_counter()
        with torch.no_grad():
            float(model(ids, use_cache=False, logits_to_keep=1).logits.sum())  # waits for a GPU
        seconds = time.perf_counter() - start
        if seconds >= ENOUGH or tokens >= most:
            return seconds / ids.shape[1]
        tokens *= 2


def tell(what: str, model: PreTrainedModel, tokens: float, factor: float) -> None:
    """Say on standard error about how long `tokens` tokens will take, each `factor` times a token of a prompt."""
    note(f"{what}: {spoken(factor * tokens * seconds_per_token(model))}")


def spoken(seconds: float) -> str:
    """ "about 3 minutes" and the like; nothing finer, as it is an estimate."""
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} minute{'s' if minutes > 1 else ''}"
    return f"about {seconds / 3600:.1f} hours"
