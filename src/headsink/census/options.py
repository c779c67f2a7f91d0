"""What a user may choose for a census, and the checks of it that need no model. Light: nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from headsink.errors import HeadsinkError

QUERIES = 512  # of a text that a census reads: docs/census.md says what reading so few costs


TAU = 0.4  # of the head's median value norm, below which a key can be a secondary sink (docs/census.md)


LEAST_TOKENS = 2  # of a text of a census


CENSUS = "census.json"  # marks the folder of a census


def check_lengths(lengths: Sequence[int], most: int | None = None) -> None:
    """Raise for a length that a census cannot read. `most`: the model's maximum, if it is known."""
    for length in lengths:
        if length < LEAST_TOKENS:
            raise HeadsinkError(f"lengths: {length} is too short, a census needs {LEAST_TOKENS} tokens or more")
        if most is not None and length > most:
            raise HeadsinkError(f"lengths: {length} is over the model's maximum of {most} tokens")


def check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise HeadsinkError(f"tau: {tau} is outside (0, 1]; {TAU} if not given")


def check_census(folder: Path) -> None:
    """Raise for a folder that is no census."""
    if not folder.is_dir():
        raise HeadsinkError(f"{folder}: no such folder; a census is a folder that headsink analyze has written")
    if not (folder / CENSUS).is_file():
        raise HeadsinkError(f"{folder}: not a census folder: it has no {CENSUS}")


def run_parts(name: str) -> tuple[str, int | None, str | None]:
    """Read `runs/a@512:code`: the folder of a census, and a length and a kind of text if they are named."""
    if Path(name).exists() or not (parts := re.fullmatch(r"(.+?)(?:@(\d+))?(?::([^/:@]+))?", name)):
        return name, None, None
    return parts[1], int(parts[2]) if parts[2] else None, parts[3]
