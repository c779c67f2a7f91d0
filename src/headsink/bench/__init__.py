"""Measurements of headsink itself, side by side with what one would use otherwise."""

import statistics
from typing import Any


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least and most of repeated measurements, and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}
