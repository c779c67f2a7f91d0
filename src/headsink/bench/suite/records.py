"""Rows: named measurements, one JSON file each, and whether measuring one again finds the same.

    {"row": "quality/smollm2/gsm8k", "command": "headsink bench all --out DIR --only quality/smollm2/gsm8k", "versions": {...},
     "commit": "597dd0b1c2d3", "machine": {...}, "limits": {"read_bytes_per_s": 8.1e10, "float32_flops": 1.9e11, ...},
     "date": "2026-11-26", "seconds": 812.0, "settings": {...}, "found": {...}}

What could not be measured has "missing", the reason and what to install, in place of "found". "resumed" is there, and true, where
the seconds are those since the row was stopped last. A row that is there with the same settings is kept. There are no paths of a
machine in it: DIR is the folder that holds rows/.

**Again.** Every figure of a row is compared with what a second measurement found. One that did not change is *the same*. A figure
with an interval has to lie *within* it. Figures of repeated measurements (`spread`: median, min, max) *overlap* if the two ranges
do, each made wider by a tenth of its median at both ends: two ranges of three rounds of one and the same thing miss each other
once in ten. Ranges of another machine are *not compared*, nor are ways that are not here now, durations without a range, p-values
(an interval says the same) and single records. Whatever else differs is *changed*, if the machine is the same; on another one,
where sums are rounded otherwise, it is not compared. *Outside* and *changed* are what there should be none of.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from headsink.bench.heading import commit, machine, versions, without_paths
from headsink.bench.limit import limits
from headsink.errors import HeadsinkError
from headsink.models.devices import parse_device
from headsink.utils.files import read_text, write_text

ROWS = "rows"
COPIED = ("command", "commit", "versions", "machine")  # of a measurement: a row says them itself
UNCOMPARED = ("p", "records", "seconds", "peers")
WIDER = 0.1
Verdict = Literal["the same", "within", "overlaps", "outside", "changed", "not compared"]


@dataclass(frozen=True)
class Row:
    """What is to be measured. measure: given a file for what is done so far; typical: seconds on 2 cores; options: what the
    command needs in addition to --out and --only."""

    name: str
    settings: dict[str, Any]
    measure: Callable[[Path], dict[str, Any]]
    typical: float
    options: str = ""

    @property
    def command(self) -> str:
        return f"headsink bench all --out DIR --only {self.name}{self.options}"


def file_of(folder: Path, name: str) -> Path:
    return folder / ROWS / f"{name}.json"


def checkpoint_of(folder: Path, row: Row) -> Path:
    """A place, a file or a folder, for what is done of a row with these settings."""
    digest = hashlib.sha256(json.dumps(row.settings, sort_keys=True).encode()).hexdigest()[:8]
    return folder / "partial" / f"{row.name.replace('/', '-')}-{digest}.partial"


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """All rows of a folder by their names."""
    return {row["row"]: row for path in sorted((folder / ROWS).rglob("*.json")) for row in (read_row(path),)}


def read_row(path: Path) -> dict[str, Any]:
    wrong = HeadsinkError(f"{path}: not a row of headsink bench all; remove it, and it is measured again")
    try:
        row = json.loads(read_text(path))
    except ValueError as error:
        raise wrong from error
    if (
        not isinstance(row, dict)
        or not {"row", "settings", "command"} <= row.keys()
        or ("found" in row) == ("missing" in row)
    ):
        raise wrong
    return row


def state(row: Row, done: dict[str, dict[str, Any]]) -> str:
    """measured, measured with other settings, missing, or to do."""
    there = done.get(row.name)
    if there is None:
        return "to do"
    if "missing" in there:
        return "missing"
    same = there["settings"] == json.loads(json.dumps(row.settings))
    return "measured" if same else "measured with other settings"


def measure(row: Row, checkpoint: Path, device: str | None = None) -> dict[str, Any]:
    """Measure a row, and what the device allows (limit.py).

    What the user could mend, a package that is not installed, makes it a missing one.
    """
    start, resumed = time.perf_counter(), checkpoint.exists()
    record: dict[str, Any] = {
        "row": row.name,
        "command": row.command,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "limits": limits(parse_device(device)),
        "date": datetime.now(UTC).date().isoformat(),
    }
    try:
        found = row.measure(checkpoint)
    except HeadsinkError as error:
        return record | {"settings": row.settings, "missing": without_paths(str(error))}
    if not checkpoint.is_dir():  # a row with a folder empties it by itself
        checkpoint.unlink(missing_ok=True)
    found = {key: value for key, value in found.items() if key not in COPIED}
    seconds = round(time.perf_counter() - start, 1)
    told = {"seconds": seconds} | ({"resumed": True} if resumed else {})
    return record | told | {"settings": row.settings, "found": found}


def save(folder: Path, record: dict[str, Any]) -> Path:
    return write_text(file_of(folder, record["row"]), json.dumps(record, indent=1) + "\n")


@dataclass(frozen=True)
class Compared:
    figure: str
    before: Any
    now: Any
    verdict: Verdict


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[Compared]:
    """Every figure of a row next to what a second measurement found."""
    if "missing" in now or "missing" in before:
        was, found = (row.get("missing", "measured") for row in (before, now))
        return [Compared(before["row"], was, found, "the same" if was == found else "changed")]
    here = before["machine"] == now["machine"]
    return list(_compared("", before["found"], now["found"], here))


def _compared(name: str, before: Any, now: Any, here: bool) -> Iterator[Compared]:
    if isinstance(before, dict) and isinstance(now, dict):
        if {"median", "min", "max", "all"} <= before.keys():
            yield Compared(name, before["median"], now.get("median"), _ranges(before, now) if here else "not compared")
            return
        for key, value in before.items():
            inner = f"{name}.{key}" if name else key
            if key in UNCOMPARED:
                continue
            if (interval := _interval(before, key)) is not None:
                yield Compared(inner, value, now.get(key), _within(value, now.get(key), interval))
            elif not key.endswith("interval") and key != "half":
                yield from _compared(inner, value, now.get(key), here)
    elif (ways := _ways(before)) and (others := _ways(now)):
        for way, value in ways.items():
            if way in others:
                yield from _compared(f"{name}[{way}]", value, others[way], here)
            else:  # a peer that is not here, or not any more
                yield Compared(f"{name}[{way}]", "measured", None, "not compared")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (value, other) in enumerate(zip(before, now, strict=True)):
            yield from _compared(f"{name}[{number}]", value, other, here)
    elif before == now:
        if not isinstance(before, str):
            yield Compared(name, before, now, "the same")
    elif not isinstance(before, str):
        yield Compared(name, before, now, "changed" if here or now is None else "not compared")


def _ways(found: Any) -> dict[str, Any]:
    """The entries of a list by their ways, if they have such."""
    named = isinstance(found, list) and all(isinstance(one, dict) and "way" in one for one in found)
    return {one["way"]: one for one in found} if named else {}


def _interval(found: dict[str, Any], key: str) -> list[float] | None:
    """Of a figure: `score_interval` of score, `interval` of kl where it is the only figure, `half` of mean."""
    if key == "mean" and "half" in found:
        return [found[key] - found["half"], found[key] + found["half"]]
    interval: list[float] | None = found.get(f"{key}_interval") or (found.get("interval") if key == "kl" else None)
    return interval


def _within(before: Any, now: Any, interval: list[float]) -> Verdict:
    if before == now:
        return "the same"
    return "within" if now is not None and interval[0] <= now <= interval[1] else "outside"


def overlap(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two ranges (median, min, max) overlap, each made wider by a tenth of its median at both ends."""
    room = WIDER * (abs(one["median"]) + abs(other["median"]))
    return one["min"] - room <= other["max"] and other["min"] - room <= one["max"]


def _ranges(before: dict[str, Any], now: dict[str, Any]) -> Verdict:
    if before == now:
        return "the same"
    if not {"median", "min", "max"} <= now.keys():
        return "changed"
    return "overlaps" if overlap(before, now) else "outside"
