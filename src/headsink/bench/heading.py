"""Provenance recorded with every benchmark result: command, commit, package versions, machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(what: str) -> dict[str, Any]:
    """Return the provenance of results. what: one line that says what they measure."""
    script = Path(sys.argv[0])
    program = f"python benchmarks/{script.name}" if script.parent.name == "benchmarks" else "headsink"
    command = " ".join([program, *sys.argv[1:]])
    return {"what": what, "command": command, "commit": commit(), "versions": versions(), "machine": machine()}


def commit() -> str | None:
    """Return the Git commit of headsink's sources, with "+" if they have changes since; None for an installed package."""
    if shutil.which("git") is None:
        return None
    folder = Path(__file__).parents[1]
    commands = (
        ("ls-files", "--error-unmatch", __file__),
        ("rev-parse", "--short=12", "HEAD"),
        ("status", "--porcelain", "."),
    )
    done = [
        subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=False) for words in commands
    ]
    if any(one.returncode for one in done):  # no repository, or another one around an installed package
        return None
    return done[1].stdout.strip() + ("+" if done[2].stdout else "")


def version_of(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:  # not installed, or run from its sources
        return None


def versions() -> dict[str, str | None]:
    packages = ("headsink", "torch", "transformers", "numba", "triton")
    return {name: version_of(name) for name in packages} | {"python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Return the hardware that times depend on: cores, threads, CPU name, memory in bytes."""
    import torch

    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    cpu = f"{named.group(1) if named else platform.processor()} ({platform.machine()})"
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": cpu, "memory_bytes": memory}


def without_paths(text: str) -> str:
    """Return a text with folders removed from the paths in it."""
    return re.sub(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[\w.@+-]+/)*(?=[\w.@+-])", "", text)
