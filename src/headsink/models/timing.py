"""How long a census or a plan will take: short forward passes are timed on this machine and scaled by the tokens to come."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from headsink.models.distributed import input_device
from headsink.utils.terminal import note

ENOUGH = 0.3  # seconds of a pass that is long enough to be timed
SHORTEST, LONGEST = 32, 2048  # tokens of such a pass
CENSUS = 1.5  # times a token of a short pass: 1.1 at 1,024 tokens of SmolLM2 on a CPU; attention to 4,096 adds the rest
PLAN = 70.0  # times a token of a short pass, for each token of the context: SmolLM2 at 416 tokens on a CPU


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
