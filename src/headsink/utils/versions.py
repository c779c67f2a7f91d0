"""The oldest and newest version of transformers that headsink is tested with, and the versions of vLLM."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from headsink.errors import HeadsinkError

OLDEST, NEWEST = "5.19", "5.24"
VLLM = ("0.32", "0.33")  # the minor versions that the plugin is written for: vLLM's interface changes with each
INSTALL = "pip install 'vllm>=0.32,<0.34'"


def check_vllm() -> str:
    """Return vLLM's version without importing vLLM. Raises HeadsinkError if it is not installed or not one of `VLLM`."""
    found = importlib.util.find_spec("vllm")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for folder in folders if (file := Path(folder) / "_version.py").is_file()]
    wanted = f"headsink serves with vLLM {' or '.join(VLLM)}: {INSTALL}"
    if not files:
        raise HeadsinkError(f"vLLM is not installed; {wanted}")
    match = re.search(r"^__version__ = .*['\"](.+)['\"]", files[0].read_text(), re.MULTILINE)
    version = match[1] if match else "of an unknown version"
    if not version.startswith(tuple(f"{minor}." for minor in VLLM)):
        raise HeadsinkError(f"vLLM {version} is installed; {wanted}")
    return version
