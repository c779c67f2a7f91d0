"""Where headsink is slower or worse, chosen from rows by rule, the worst first.

Every ratio of times or bytes, of another way to one of ours in the same case, that is below 1; every change of a score whose
interval leaves out 0 on the bad side; every KL whose interval does.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from headsink.bench.suite.tables import OURS, Link, Record, of_kind, sure, table, values


class Worse(NamedTuple):
    """What is worse under a plan, and how much: the lower the worse."""

    ratio: float
    cells: list[str]


def worse(found: dict[str, Record], link: Link, served: Record, served_link: str) -> list[str]:
    """All that is worse, by the rules of the module. served: what benchmarks/serving.py found, empty if it did not run."""
    beside = ["", "tokens x texts", "ours", "against", "ratio", "row"]
    told = [
        (
            "Slower: times of others against ours, in one round",
            beside,
            [*slower(found, link), *serving(served, served_link)],
        ),
        ("More memory: bytes of others against ours", beside, more(found, link)),
        ("Worse scores", ["task", "budget", "full", "under the plan", "change", "row"], scores(found, link)),
        (
            "Other distributions: KL(full || plan), nats a token",
            ["task", "budget", "KL", "row"],
            divergences(found, link),
        ),
    ]
    parts = []
    for title, heads, cases in told:
        lines = [one.cells for one in sorted(cases, key=lambda one: one.ratio)]
        parts += [f"**{title}**", table(heads, lines) if lines else "Nowhere in these rows."]
    return parts


def slower(found: dict[str, Record], link: Link) -> Iterator[Worse]:
    what = {"decode_s": "a token", "prefill_s": "first token"}
    yield from _below(found, link, "speed", what)


def serving(found: Record, link: str) -> Iterator[Worse]:
    """Ratios of serving under the plan to stock vLLM."""
    for name, value in found.items():
        if name.endswith("_ratio") and (ratio := statistics.median(values(value))) < 1:
            said = f"{ratio:.3f} ({min(values(value)):.3f} to {max(values(value)):.3f})"
            what = f"serving: {name.removesuffix('_ratio')}"
            yield Worse(ratio, [what, str(found.get("model", "")), "headsink serve", "vLLM", said, link])


def more(found: dict[str, Record], link: Link) -> Iterator[Worse]:
    what = {"kv_bytes": "KV cache", "peak_bytes": "peak of the process"}
    yield from _below(found, link, "memory", what)


def _below(found: dict[str, Record], link: Link, kind: str, what: dict[str, str]) -> Iterator[Worse]:
    """Every way of ours beside every other one of the same case."""
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
                        case = f"{model}, {ours['context']:,} x {ours['batch']}"
                        said = f"{ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
                        yield Worse(ratio, [name, case, ours["way"], other["way"], said, link(row["row"])])


def scores(found: dict[str, Record], link: Link) -> Iterator[Worse]:
    """Sorted by what is left of the score."""
    for model, tasks in of_kind(found, "quality").items():
        for row in tasks.values():
            full = next(way["score"] for way in row["found"]["ways"] if way["way"] == "full")
            higher = row["found"]["higher_is_better"]
            for way in row["found"]["ways"]:
                if "change" in way and is_worse(row["found"], way):
                    left = way["score"] / full if higher else full / way["score"]
                    case = [f"{model}, {row['found']['task']}", way["way"], f"{full:.3f}", f"{way['score']:.3f}"]
                    yield Worse(left, [*case, sure(way, "change", "+.3f"), link(row["row"])])


def is_worse(task: Record, way: Record) -> bool:
    """Whether the interval of the change of a task's score leaves out 0 on the bad side."""
    low, high = way["change_interval"]
    return bool(high < 0 if task["higher_is_better"] else low > 0)


def divergences(found: dict[str, Record], link: Link) -> Iterator[Worse]:
    for model, tasks in of_kind(found, "quality").items():
        for row in tasks.values():
            for way in row["found"]["ways"]:
                if way.get("kl_interval") and way["kl_interval"][0] > 0:
                    case = [f"{model}, {row['found']['task']}", way["way"]]
                    yield Worse(-way["kl"], [*case, sure(way, "kl", ".4f"), link(row["row"])])
