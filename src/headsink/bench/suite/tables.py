"""Rows of `headsink bench all` as the results page reads them, and how its tables and figures look."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OURS = "headsink"  # how our ways begin
Record = dict[str, Any]
Link = Callable[[str], str]  # the name of a row, as a link to its file


def of_kind(found: dict[str, Record], kind: str) -> dict[str, dict[str, Record]]:
    """Rows of a kind: by model, by what comes after the model in their names."""
    models: dict[str, dict[str, Record]] = {}
    for name, row in found.items():
        first, model, *rest = name.split("/")
        if first == kind:
            models.setdefault(model, {})["/".join(rest)] = row
    return models


def named(way: str) -> str:
    return f"**{way}**" if way.startswith(OURS) else way


def relative(path: Path, place: Path) -> str:
    return Path(os.path.relpath(path.absolute(), place.absolute())).as_posix()


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    rows = [list(heads), *map(list, lines)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def ranged(spread: Record, scale: float = 1, digits: int = 1) -> str:
    """43.1 (43.0 to 43.7)"""
    median, least, most = (f"{scale * spread[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def between(interval: list[float], form: str) -> str:
    return " to ".join(format(end, form) for end in interval)


def sure(found: Record, key: str, form: str) -> str:
    """A figure with its interval, if it has one; nothing if there is none."""
    if found.get(key) is None:
        return ""
    interval = found.get(f"{key}_interval") or found.get("interval")
    return format(found[key], form) + (f" ({between(interval, form)})" if interval else "")


def values(value: Any) -> list[float]:
    return list(value["all"]) if isinstance(value, dict) else [float(value)]
