"""Options of a census and checks of them that need no model. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from headsink.errors import HeadsinkError

QUERIES = 512  # sampled queries per text; docs/census.md has the resulting error
TAU = 0.4  # a secondary sink has a value norm below this factor times the head's median (docs/census.md)
LEAST_TOKENS = 2  # tokens of a text at least
CENSUS = "census.json"  # a folder with this file is a census


def check_lengths(lengths: Sequence[int], most: int | None = None) -> None:
    """Raise for a length that a census cannot use. most: the model's maximum, if it is known."""
    for length in lengths:
        if length < LEAST_TOKENS:
            raise HeadsinkError(f"lengths: {length} is too short, a census needs {LEAST_TOKENS} tokens or more")
        if most is not None and length > most:
            raise HeadsinkError(f"lengths: {length} is over the model's maximum of {most} tokens")


def check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise HeadsinkError(f"tau: {tau} is outside (0, 1]; the default is {TAU}")


def check_census(folder: Path) -> None:
    """Raise for a folder that is not a census."""
    if not folder.is_dir():
        raise HeadsinkError(f"{folder}: no such folder; a census is a folder that headsink analyze has written")
    if not (folder / CENSUS).is_file():
        raise HeadsinkError(f"{folder}: not a census folder: it has no {CENSUS}")


def run_parts(name: str) -> tuple[str, int | None, str | None]:
    """Parse `runs/a@512:code` into a census folder, a length and a kind of text; the last two may be None."""
    if Path(name).exists() or not (parts := re.fullmatch(r"(.+?)(?:@(\d+))?(?::([^/:@]+))?", name)):
        return name, None, None
    return parts[1], int(parts[2]) if parts[2] else None, parts[3]
