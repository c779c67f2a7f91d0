"""Provenance recorded with every benchmark result: command, package versions, machine."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(what: str) -> dict[str, Any]:
    """Return the provenance of a script's results. what: one line that says what it measures."""
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
    except PackageNotFoundError:  # not installed, or run from its sources
        return None


def versions() -> dict[str, str | None]:
    return dict(provenance("")["versions"]) | {"python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Return the hardware that times depend on: cores, threads, CPU name, memory in bytes."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    name = named.group(1) if named else platform.processor()
    return dict(provenance("")["machine"]) | {"cpu": f"{name} ({platform.machine()})", "memory_bytes": memory}


def without_paths(text: str) -> str:
    """Return a text with folders removed from the paths in it."""
    return re.sub(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[\w.@+-]+/)*(?=[\w.@+-])", "", text)
