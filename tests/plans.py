"""Random plans."""

import random

from headsink import Pattern, Plan
from headsink.architecture import describe


def random_pattern(rng: random.Random) -> Pattern:
    if rng.random() < 0.25:
        return Pattern()
    return Pattern(rng.choice([0, 1, 3, 5]), rng.choice([0, 0, 2, 5]), rng.choice([0, 1, 2, 5, 8, 17, 300]))


def random_plan(model, seed: int) -> Plan:
    """A plan with every kind of pattern, and value norms such that a third of the keys of tiny models (families.py) are short."""
    rng, shape = random.Random(seed), describe(model)
    patterns = [None if window else [random_pattern(rng) for _ in range(shape.kv_heads)] for window in shape.windows]
    norms = [row and [rng.uniform(5.5, 7.0) for _ in row] for row in patterns]
    return Plan.of(model, patterns, norms, tau=0.9)
