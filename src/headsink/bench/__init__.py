"""Measurements of headsink itself, side by side with what one would use otherwise."""

import os
import platform
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least and most of repeated measurements, and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def heading(what: str) -> dict[str, Any]:
    """What a script measures, how it was called, with which versions, on what."""
    import torch

    return {
        "what": what,
        "command": "python " + " ".join(sys.argv),
        "versions": {name: _version(name) for name in ("headsink", "torch", "transformers", "numba", "triton")},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": platform.machine()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # not there, or run from its sources
        return None
