"""The oldest and newest version of transformers that headsink is tested with, and the version of vLLM."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from headsink.errors import HeadsinkError

OLDEST, NEWEST = "5.19", "5.24"
VLLM = "0.32"  # the minor version that the plugin is written for: vLLM's interface changes with every minor version


def check_vllm() -> str:
    """Return vLLM's version without importing vLLM. Raises HeadsinkError if it is not installed or not `VLLM`."""
    found = importlib.util.find_spec("vllm")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for folder in folders if (file := Path(folder) / "_version.py").is_file()]
    if not files:
        raise HeadsinkError(f"vLLM is not installed; headsink serves with vLLM {VLLM}: pip install 'vllm=={VLLM}.*'")
    match = re.search(r"^__version__ = .*['\"](.+)['\"]", files[0].read_text(), re.MULTILINE)
    version = match[1] if match else "of an unknown version"
    if not version.startswith(f"{VLLM}."):
        raise HeadsinkError(
            f"vLLM {version} is installed; headsink serves with {VLLM} only: pip install 'vllm=={VLLM}.*'"
        )
    return version
