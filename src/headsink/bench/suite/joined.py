"""One table from the rows of several machines, or of several settings of one: ratios and score changes side by side.

Only figures that travel between machines are joined: ratios to transformers on the same machine, and changes against the full
cache on the same prompts. Machines agree on a figure if the ranges of their rounds, or the intervals of changes, overlap as for
`headsink bench rerun` (records.py); then the median is shown, and otherwise the range of their medians, in bold.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headsink.bench.suite.records import overlap, read_rows
from headsink.bench.tables import UNKNOWN, Record, budget_name, emphasize, format_range, hardware, relative, table
from headsink.errors import HeadsinkError
from headsink.utils.files import write_text

RATIOS = {
    "speed": {"decode_ratio": "TPOT ratio", "prefill_ratio": "TTFT ratio"},
    "memory": {"kv_ratio": "KV cache ratio", "peak_ratio": "peak memory ratio"},
}


class _Figure(NamedTuple):
    """What a figure is of. case: context and sequences, or a task and its prompts."""

    name: str
    model: str
    case: str
    way: str


def write(folders: Sequence[Path], out: Path, force: bool = False) -> Path:
    """Write the page. Raises HeadsinkError for folders of the same name, and without a figure that two of them have."""
    names = [folder.resolve().name for folder in folders]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise HeadsinkError(f"folders: two are called {repeated[0]}; columns go by it, so rename one")
    rows = {name: _measured(folder) for name, folder in zip(names, folders, strict=True)}
    figures = {name: {key: value for row in own.values() for key, value in _figures(row)} for name, own in rows.items()}
    lines = []
    for key in dict.fromkeys(key for own in figures.values() for key in own):
        found = [own.get(key) for own in figures.values()]
        if len(known := [one for one in found if one is not None]) > 1:
            lines.append([*key, *("" if one is None else format_range(one, 1, 3) for one in found), _joined(known)])
    if not lines:
        raise HeadsinkError(f"folders: no row is in two of {', '.join(names)}; measure the same rows on each machine")
    given = " ".join(relative(folder, Path.cwd()) for folder in folders)
    parts = [
        "# Results of several machines",
        f"Made by `headsink bench results {given} --out {relative(out, Path.cwd())}` from the rows of `headsink bench all`. "
        "Do not edit.",
        "Ratios are time of transformers on the same machine over time, and bytes over bytes of transformers. A score change is "
        "against the full cache. *All*: the median where machines agree within their ranges, else the range of their medians.",
        table(
            [
                "folder",
                "rows",
                "machine",
                "commit",
                "packages",
                "reads, GB/s",
                "float32, bfloat16, GFLOP/s",
                "baseline",
            ],
            [line for name, own in rows.items() for line in _machines(name, own)],
        ),
        table(["figure", "model", "case", "", *names, "all"], lines),
    ]
    return write_text(out, "\n\n".join(parts) + "\n", force)


def _measured(folder: Path) -> dict[str, Record]:
    found = {name: row for name, row in read_rows(folder).items() if "found" in row}
    if not found:
        raise HeadsinkError(f"{folder}: no row in it was measured; headsink bench all --out {folder} does that")
    return found


def _figures(row: Record) -> Iterator[tuple[_Figure, dict[str, float]]]:
    """Yield the figures of a row with their median, minimum and maximum."""
    kind, model, *_ = row["row"].split("/")
    found = row["found"]
    if kind in ("quality", "suite"):
        for way in found["ways"]:
            if "change" in way:
                low, high = way["change_interval"]
                figure = _Figure(
                    "score change", model, f"{found['task']}, {found['items']} prompts", budget_name(way["way"])
                )
                yield figure, {"median": way["change"], "min": low, "max": high}
    for one in found["results"] if kind in RATIOS else ():
        for key, name in RATIOS[kind].items():
            value = one.get(key)
            if value is not None and one["way"] != "transformers":
                figure = _Figure(name, model, f"{one['context']:,} x {one['batch']}", emphasize(one["way"]))
                yield figure, value if isinstance(value, dict) else dict.fromkeys(("median", "min", "max"), value)


def _joined(found: list[dict[str, float]]) -> str:
    medians = [one["median"] for one in found]
    if all(overlap(one, other) for one in found for other in found):
        return f"{statistics.median(medians):.3f}"
    return f"**{min(medians):.3f}–{max(medians):.3f}**"


def _machines(name: str, rows: dict[str, Record]) -> Iterator[list[str]]:
    """Yield a line for each machine and version of a folder, with the kinds of its rows."""
    lines: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    for row in rows.values():
        packages = ", ".join(f"{package} {number}" for package, number in row["versions"].items() if number)
        about = hardware(row["machine"]), row.get("commit") or UNKNOWN, packages
        own = lines.setdefault(about, {"kinds": [], "limits": [], "baseline": []})
        own["kinds"].append(row["row"].split("/")[0])
        own["limits"] += [row["limits"]] if "limits" in row else []
        own["baseline"] += [row["found"]["baseline_kernels"]] if "baseline_kernels" in row["found"] else []
    for (machine, commit, packages), own in lines.items():
        kinds = ", ".join(dict.fromkeys(own["kinds"]))
        limits = {
            key: f"{max(one[key] for one in own['limits']) / 1e9:.0f}" if own["limits"] else UNKNOWN
            for key in ("read_bytes_per_s", "float32_flops", "bfloat16_flops")
        }
        kernels = dict.fromkeys(_kernels(one) for one in own["baseline"])
        both = f"{limits['float32_flops']}, {limits['bfloat16_flops']}" if own["limits"] else UNKNOWN
        yield [name, kinds, machine, commit, packages, limits["read_bytes_per_s"], both, "; ".join(kernels) or UNKNOWN]


def _kernels(found: Record) -> str:
    """The names of the operators of the baseline, of prompts and of single tokens where they differ."""
    both = [", ".join(found[key]) or found["attention"] for key in ("prefill", "decode")]
    return " / ".join(dict.fromkeys(both))
