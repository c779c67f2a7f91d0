"""Scorers of cached keys. A new one is a file in this package and an entry in `SCORERS`."""

from headsink.errors import HeadsinkError
from headsink.eviction.scorers.linear import LINEAR
from headsink.eviction.scorers.scorer import ALWAYS, NONE, Scorer

SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (LINEAR,)}


def find_scorer(name: str) -> Scorer:
    """Return the scorer with this name. Raises HeadsinkError if there is none."""
    if name not in SCORERS:
        raise HeadsinkError(f"scorer: {name!r} is unknown; one of {', '.join(SCORERS)}")
    return SCORERS[name]


__all__ = ["ALWAYS", "LINEAR", "NONE", "SCORERS", "Scorer", "find_scorer"]
