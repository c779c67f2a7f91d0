"""The first two tables of docs/results.md: what every plan costs over all tasks and in time, and its patterns."""

from __future__ import annotations

import statistics

from headsink.bench.suite.regressions import is_worse
from headsink.bench.tables import NOT_MEASURED, OURS, UNKNOWN, Link, Record, of_kind, pattern, table, tasks_of

HEADS = [
    "model",
    "KV budget",
    "tasks worse",
    "KL, nats/token",
    "same tokens",
    "context",
    "TPOT, ms",
    "TTFT, s",
    "KV cache, MB",
]
MOST_PATTERNS = 8  # of a plan that are listed; a packaged plan has nearly as many as KV heads
SAID = (
    "*Tasks worse*: tasks whose score change has its 95 % interval on the worse side of 0, among those on which the full cache "
    "scores above 0. Few prompts show only large changes. KL and *same tokens* (share of greedy tokens before the first "
    "difference from the full cache) are more sensitive: median over the tasks, with the range. TPOT, TTFT and KV cache: one "
    "sequence, longest context timed."
)


def summary(found: dict[str, Record], link: Link) -> list[str]:
    """A line for each model and budget, and one for each other engine that ran the model."""
    lines = []
    for model, tasks in tasks_of(found).items():
        measured = [row["found"] for row in tasks.values()]
        longest = max(
            _single_sequence_rows(found, model), key=lambda row: row["found"]["results"][0]["context"], default=None
        )
        results = {one["way"]: one for one in longest["found"]["results"]} if longest else {}
        # Columns with reconstruction are in the table of suites alone.
        budgets = (way["way"] for one in measured for way in one["ways"] if "change" in way and "," not in way["way"])
        for budget in dict.fromkeys(budgets):
            ways = [(one, way) for one in measured for way in one["ways"] if way["way"] == budget]
            bad = sum(is_worse(one, way) for one, way in ways)
            able = sum(not one["higher_is_better"] or one["ways"][0]["score"] > 0 for one, _ in ways)
            lines.append(
                [
                    *(link(f"plan/{model}", model), f"**{float(budget):.1%}**", f"{bad} of {able}"),
                    _over([way.get("kl") for _, way in ways], ".3f"),
                    _over([way.get("same_tokens") for _, way in ways], ".0%"),
                    *_costs(longest, _ours(results, budget), link),
                ]
            )
        others = (one for way, one in results.items() if not way.startswith(OURS))
        lines += [[model, one["way"], "", "", "", *_costs(longest, one, link)] for one in others]
    return [SAID, table(HEADS, lines)] if lines else [NOT_MEASURED]


def plans(found: dict[str, Record], link: Link) -> list[str]:
    """The patterns of each plan, and its KL on the calibration's own documents."""
    lines = [
        [
            *(link(row["row"], model), f"{one['budget']:.1%}", f"{one['kept']:.1%}"),
            *(f"{one['verified'][kind]:.4f}" for kind in ("kl_text", "kl_answers")),
            _patterns(one["patterns"]),
        ]
        for model, cases in of_kind(found, "plan").items()
        for row in cases.values()
        for one in row["found"]["plans"]
    ]
    said = (
        "Keys of each KV head as sink tokens + top-k keys (k) + window; `full` is full attention. KL in nats per token on the "
        "calibration documents."
    )
    heads = ["model", "KV budget", "cached", "KL, text", "KL, answers", "KV heads"]
    return [said, table(heads, lines)] if lines else [NOT_MEASURED]


def _patterns(counts: dict[str, int]) -> str:
    """The most frequent patterns, and how many KV heads have another one."""
    named, others = list(counts.items())[:MOST_PATTERNS], list(counts.values())[MOST_PATTERNS:]
    listed = [f"{count}x {pattern(name)}" for name, count in named]
    return ", ".join(listed + ([f"{sum(others)} others"] if others else []))


def _single_sequence_rows(found: dict[str, Record], model: str) -> list[Record]:
    """Speed rows of one sequence."""
    rows = of_kind(found, "speed").get(model, {}).values()
    return [row for row in rows if row["found"]["results"][0]["batch"] == 1]


def _over(figures: list[float | None], form: str) -> str:
    known = [figure for figure in figures if figure is not None]
    if not known:
        return UNKNOWN
    return f"{statistics.median(known):{form}} ({min(known):{form}}–{max(known):{form}})"


def _ours(results: dict[str, Record], budget: str) -> Record | None:
    """The compiled step under a plan, or the model's passes where nothing is compiled."""
    ways = (f"{OURS}, {budget}", f"{OURS}, {budget}, model's passes")
    return next((results[way] for way in ways if way in results), None)


def _costs(row: Record | None, one: Record | None, link: Link) -> list[str]:
    """Context, TPOT, TTFT and bytes of the KV cache."""
    if row is None or one is None:
        return ["not measured", "", "", ""]
    kv = UNKNOWN if one["kv_bytes"] is None else f"{one['kv_bytes'] / 1e6:.1f}"
    decode, prefill = (one[key]["median"] for key in ("decode_s", "prefill_s"))
    return [link(row["row"], f"{one['context']:,}"), f"{1e3 * decode:.1f}", f"{prefill:.2f}", kv]
