"""Where headsink is slower or worse, selected from the rows by rule, the worst first.

The rules: every ratio of times or bytes, of another engine to one of ours in the same case, that is below 1; every score change
whose 95 % interval lies on the bad side of 0; the number of KL divergences whose interval lies above 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

from headsink.bench.options import SERVERS
from headsink.bench.tables import OURS, Link, Record, budget_name, of_kind, table, tasks_of, values

NONE = "None in these rows."


class Regression(NamedTuple):
    """A figure that is worse under a plan. ratio: the lower the worse; case: cells that figures of one case share."""

    ratio: float
    case: tuple[str, ...]
    figure: str


def find_regressions(found: dict[str, Record], link: Link, served: Record, served_link: str) -> list[str]:
    """Return all that is worse. served: the result of `headsink bench serving`, empty if it did not run."""
    compared = ["", "context x sequences", "compared with", "ratio"]
    timed = [*slower(found, link), *serving(served, served_link)]
    lists = [
        ("Slower (time of the other engine / time of headsink, within a round)", compared, timed),
        ("More memory (bytes of the other engine / bytes of headsink)", compared, more(found, link)),
        ("Worse scores", ["model", "task", "full cache", "under the plan"], scores(found, link)),
    ]
    parts = []
    for title, heads, cases in lists:
        lines = _by_case(cases)
        parts += [f"**{title}**", table(heads, lines) if lines else NONE]
    return [*parts, *divergences(found)]


def _by_case(cases: Iterable[Regression]) -> list[list[str]]:
    """One line for each case, with its figures in one cell."""
    figures: dict[tuple[str, ...], list[str]] = {}
    for one in sorted(cases, key=lambda one: one.ratio):
        figures.setdefault(one.case, []).append(one.figure)
    return [[*case, "<br>".join(told)] for case, told in figures.items()]


def slower(found: dict[str, Record], link: Link) -> Iterator[Regression]:
    yield from _below(found, link, "speed", {"decode_s": "TPOT", "prefill_s": "TTFT"})


def serving(found: Record, link: str) -> Iterator[Regression]:
    """Throughput of serving under the plan, divided by that of stock vLLM."""
    for one in found.get("ratios", []):
        ratios = values(one["tokens_per_s"])
        if (ratio := statistics.median(ratios)) < 1:
            case = ("serving: throughput", f"{link}, {one['clients']} clients", "vLLM")
            yield Regression(ratio, case, _ratio(SERVERS[one["way"]], ratios))


def more(found: dict[str, Record], link: Link) -> Iterator[Regression]:
    yield from _below(found, link, "memory", {"kv_bytes": "KV cache", "peak_bytes": "peak memory"})


def _below(found: dict[str, Record], link: Link, kind: str, what: dict[str, str]) -> Iterator[Regression]:
    """Every way of ours against every other one of the same case."""
    for model, cases in of_kind(found, kind).items():
        for row in cases.values():
            results = row["found"]["results"]
            own = [one for one in results if one["way"].startswith(OURS)]
            for ours, other in product(own, (one for one in results if one not in own)):
                if (ours["context"], ours["batch"]) != (other["context"], other["batch"]):
                    continue
                for key, name in what.items():
                    if ours[key] is None or other[key] is None:
                        continue
                    ratios = [b / a for a, b in zip(values(ours[key]), values(other[key]), strict=False)]
                    ratio = statistics.median(ratios)
                    if ratio < 1:
                        size = link(row["row"], f"{model}, {ours['context']:,} x {ours['batch']}")
                        way = ours["way"].removeprefix(f"{OURS}, ")
                        yield Regression(ratio, (name, size, other["way"]), _ratio(way, ratios))


def _ratio(way: str, ratios: list[float]) -> str:
    return f"{way}: {statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"


def scores(found: dict[str, Record], link: Link) -> Iterator[Regression]:
    """Sorted by the share of the full cache's score that is left."""
    for model, tasks in tasks_of(found).items():
        for row in tasks.values():
            full = next(way["score"] for way in row["found"]["ways"] if way["way"] == "full")
            higher = row["found"]["higher_is_better"]
            for way in row["found"]["ways"]:
                if "change" in way and is_worse(row["found"], way):
                    left = way["score"] / full if higher else full / way["score"]
                    case = (model, link(row["row"], row["found"]["task"]), f"{full:.3f}")
                    yield Regression(left, case, f"{budget_name(way['way'])}: {way['score']:.3f}")


def is_worse(task: Record, way: Record) -> bool:
    """Whether the interval of the change of a task's score lies on the bad side of 0."""
    low, high = way["change_interval"]
    return bool(high < 0 if task["higher_is_better"] else low > 0)


def divergences(found: dict[str, Record]) -> list[str]:
    """How many KL divergences are above 0 with their whole interval; the agreement table has every one."""
    intervals = [
        way["kl_interval"]
        for tasks in of_kind(found, "quality").values()
        for row in tasks.values()
        for way in row["found"]["ways"]
        if way.get("kl_interval")
    ]
    above = sum(low > 0 for low, _ in intervals)
    return [
        "**Other distributions**",
        f"KL(full || plan) is above 0 with its whole interval in {above} of {len(intervals)} pairs of task and budget "
        "([agreement](#agreement-with-the-full-cache)).",
    ]
