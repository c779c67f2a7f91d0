"""Random plans, and a plan's quality."""

import random

import torch

from headsink import Pattern, Plan
from headsink.eviction.scorers import LINEAR
from headsink.models.spec import describe

RETRIEVAL = {"form": "quote", "asked": 4, "right_full": 4, "right_plan": 3, "nll_full": 0.1, "nll_plan": 0.4}
QUALITY = {
    "context": 512,
    "documents": 4,
    "positions": 1020,
    "kl": 0.02,
    "kl_interval": [0.01, 0.03],
    "top1": 0.97,
    "top1_interval": [0.96, 0.98],
    "nll_full": 2.5,
    "nll_plan": 2.4,
    "nll_change_interval": [-0.2, 0.1],
    "retrieval": [RETRIEVAL],
    "kv_bytes": 10,
    "kv_bytes_full": 40,
}


def random_pattern(rng: random.Random) -> Pattern:
    if rng.random() < 0.25:
        return Pattern()
    return Pattern(rng.choice([0, 1, 3, 5]), rng.choice([0, 0, 2, 5]), rng.choice([0, 1, 2, 5, 8, 17, 300]))


def random_plan(model, seed: int, draw=random_pattern, scorer=LINEAR) -> Plan:
    """A plan with all kinds of patterns, or with those of `draw`, and random scorer weights."""
    rng, shape = random.Random(seed), describe(model)
    patterns = [[draw(rng) for _ in range(shape.kv_heads)] if own else None for own in shape.planned]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape.layers, shape.kv_heads, scorer.n_features(shape.head_dim), generator=generator)
    return Plan.of(model, patterns, weights, scorer=scorer.name, decode_window=rng.choice([0, 3, 40]))


def window_pattern(rng: random.Random) -> Pattern:
    return Pattern(rng.choice([0, 1, 3, 5]), 0, rng.choice([0, 1, 2, 5, 8, 17, 300]))


def window_plan(model, seed):
    plan = random_plan(model, seed, window_pattern)
    return plan.model_copy(update={"positions": "cache-relative", "decode_window": 0})
