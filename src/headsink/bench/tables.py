"""Tables and figures of the results page, and the rows of `headsink bench all` sorted for it.

Parentheses hold a range of rounds, minimum to maximum: `43.1 (43.0–43.7)`. Brackets hold a 95 % interval: `0.50 [0.40, 0.60]`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

OURS = "headsink"  # the first word of the names of our ways
UNKNOWN = "not reported"
NOT_MEASURED = "Not measured."
Record = dict[str, Any]


class Link(Protocol):
    def __call__(self, name: str, text: str = "") -> str:
        """Return a link to the file of a row, with the row's name as its text if none is given."""


def of_kind(found: dict[str, Record], kind: str) -> dict[str, dict[str, Record]]:
    """Rows of a kind: by model, by what comes after the model in their names."""
    models: dict[str, dict[str, Record]] = {}
    for name, row in found.items():
        first, model, *rest = name.split("/")
        if first == kind:
            models.setdefault(model, {})["/".join(rest)] = row
    return models


def tasks_of(found: dict[str, Record]) -> dict[str, dict[str, Record]]:
    """Rows of tasks, those of long-context suites included: by model, by what comes after the model in their names."""
    both = of_kind(found, "quality"), of_kind(found, "suite")
    return {model: both[0].get(model, {}) | both[1].get(model, {}) for model in both[0] | both[1]}


def budget_name(way: str) -> str:
    """The name of a plan's column: `25.0%`, or `25.0%, reconstruction`."""
    budget, *how = way.split(", ")
    return ", ".join([f"{float(budget):.1%}", *how])


def emphasize(way: str) -> str:
    return f"**{way}**" if way.startswith(OURS) else way


def pattern(name: str) -> str:
    """The name of a pattern today. Rows that were measured before the rename write `f` for top-k keys."""
    return re.sub(r"(?<=\d)f\b", "k", name)


def hardware(machine: Record) -> str:
    """What tells machines apart: the CPU, its cores, and the threads of torch."""
    counts = (f"{machine[what]} {what if machine[what] != 1 else what[:-1]}" for what in ("cores", "threads"))
    return ", ".join([machine["cpu"], *counts])


def relative(path: Path, place: Path) -> str:
    return Path(os.path.relpath(path.absolute(), place.absolute())).as_posix()


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    rows = [list(heads), *map(list, lines)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def format_range(spread: Record, scale: float = 1, digits: int = 1) -> str:
    """43.1 (43.0–43.7)"""
    median, least, most = (f"{scale * spread[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least}–{most})"


def sure(found: Record, key: str, form: str) -> str:
    """A figure with its interval, if it has one; nothing if there is none."""
    if found.get(key) is None:
        return ""
    interval = found.get(f"{key}_interval") or found.get("interval")
    low_high = ", ".join(format(end, form) for end in interval) if interval else ""
    return format(found[key], form) + (f" [{low_high}]" if interval else "")


def values(value: Any) -> list[float]:
    return list(value["all"]) if isinstance(value, dict) else [float(value)]
