"""The beginning of docs/results.md: each plan in a line, over all tasks and at the longest context that was timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from headsink.bench.suite.regressions import is_worse
from headsink.bench.suite.tables import OURS, Link, Record, of_kind, table


def summary(found: dict[str, Record], link: Link) -> list[str]:
    """A line for each model and budget that a task was measured with."""
    lines = []
    for model, tasks in of_kind(found, "quality").items():
        measured = [row["found"] for row in tasks.values()]
        longest = max(_timed(found, model), key=lambda row: row["found"]["results"][0]["context"], default=None)
        for budget in dict.fromkeys(way["way"] for one in measured for way in one["ways"] if "change" in way):
            ways = [(one, way) for one in measured for way in one["ways"] if way["way"] == budget]
            bad = sum(is_worse(one, way) for one, way in ways)
            able = sum(not one["higher_is_better"] or one["ways"][0]["score"] > 0 for one, _ in ways)
            lines.append(
                [
                    *(model, f"{float(budget):.1%}", f"{bad} of {able}"),
                    _over([way["kl"] for _, way in ways], ".3f"),
                    _over([way["same_tokens"] for _, way in ways], ".0%"),
                    *_beside(longest, budget),
                    f"{link(f'plan/{model}')}, `quality/{model}/*`" + (f", {link(longest['row'])}" if longest else ""),
                ]
            )
    heads = ["model", "plan", "tasks that it makes worse", "KL, nats a token", "same tokens"]
    heads += ["tokens", "ms a token", "first token, s", "KV cache, MB", "row"]
    said = (
        "A task is made worse if the interval of the change of its score leaves out 0; counted are those in which the model "
        "itself scores anything. With few prompts only large changes are seen so: KL and the share of the model's own tokens "
        "before the first that differs say more (the median of the tasks, with the least and the most). Then, at the longest "
        "context that was timed, one text: under the plan, and without it by transformers and whatever else was there."
    )
    return [said, table(heads, lines)] if lines else ["Not measured yet."]


def plans(found: dict[str, Record], link: Link) -> list[str]:
    """What was calibrated, as it was verified on the calibration's own documents."""
    lines = [
        [
            *(model, f"{one['budget']:.1%}", f"{one['kept']:.1%}"),
            *(f"{one['verified'][kind]:.4f}" for kind in ("kl_text", "kl_answers")),
            ", ".join(f"{count} x {pattern}" for pattern, count in one["patterns"].items()),
            link(row["row"]),
        ]
        for model, cases in of_kind(found, "plan").items()
        for row in cases.values()
        for one in row["found"]["plans"]
    ]
    said = (
        "Keys of each KV head: first tokens + top_k (f) + window. KL in nats a token, on the documents that the plans were "
        "calibrated with; what they cost elsewhere is below."
    )
    heads = ["model", "budget", "kept", "KL of text", "KL of answers", "KV heads", "row"]
    return [said, table(heads, lines)] if lines else ["Not measured yet."]


def _timed(found: dict[str, Record], model: str) -> list[Record]:
    """Rows of one text at a time."""
    rows = of_kind(found, "speed").get(model, {}).values()
    return [row for row in rows if row["found"]["results"][0]["batch"] == 1]


def _over(told: list[float | None], form: str) -> str:
    values = [value for value in told if value is not None]
    if not values:
        return "not told"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _beside(row: Record | None, budget: str) -> list[str]:
    """Context, and times and bytes of a plan, of transformers and of peers."""
    results = {one["way"]: one for one in row["found"]["results"]} if row else {}
    ours = next((way for way in (f"{OURS}, {budget}", f"{OURS}, {budget}, model.generate") if way in results), None)
    if ours is None:
        return ["not measured", "", "", ""]
    others = [way for way in results if not way.startswith(OURS)]

    def cell(figure: Callable[[Record], str]) -> str:
        beside = "".join(f"; {way} {figure(results[way])}" for way in others)
        return f"**{figure(results[ours])}**{beside}"

    return [
        f"{results[ours]['context']:,}",
        cell(lambda one: f"{1e3 * one['decode_s']['median']:.1f}"),
        cell(lambda one: f"{one['prefill_s']['median']:.2f}"),
        cell(lambda one: "not told" if one["kv_bytes"] is None else f"{one['kv_bytes'] / 1e6:.1f}"),
    ]
