"""The pictures of docs/results.md, for each model: score changes under plans, KL from the full cache, and time and memory
against context."""

from __future__ import annotations

from typing import Any

import altair as alt

from headsink.report.charts import Drawn, spec
from headsink.utils.colours import BLUE

WAYS = alt.Legend(orient="bottom", columns=3, labelLimit=300)


def drawn(done: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return charts as Vega-Lite, by name."""
    found: dict[str, dict[str, Any]] = {}
    for model in dict.fromkeys(name.split("/")[1] for name in done):
        rows = {
            kind: [row["found"] for name, row in done.items() if name.startswith(f"{kind}/{model}/") and "found" in row]
            for kind in ("quality", "speed")
        }
        if rows["quality"]:
            found[f"quality-{model}"] = spec(
                _quality(rows["quality"]), f"{model}: score change under a plan, against the full cache"
            )
        if points := _divergences(rows["quality"]):
            found[f"agreement-{model}"] = spec(_agreement(points), f"{model}: KL from the full cache under a plan")
        if rows["speed"]:
            found[f"speed-{model}"] = spec(_speed(rows["speed"]), f"{model}: one sequence")
    return found


def _quality(tasks: list[dict[str, Any]]) -> Drawn:
    """Score changes with their intervals against the KV budget, a panel for each task."""
    points = [
        {"task": f"{task['task']}, {task['metric']}", "budget": way["way"], "change": way["change"]}
        | dict(zip(("low", "high"), way["change_interval"], strict=True))
        for task in tasks
        for way in task["ways"]
        if "change" in way
    ]
    budgets = sorted({point["budget"] for point in points}, key=float, reverse=True)
    base = alt.Chart().encode(x=alt.X("budget:N", sort=budgets, title="KV budget").axis(labelAngle=0))
    zero = alt.Chart().mark_rule(strokeDash=[2, 3], color="#333").encode(y=alt.datum(0))
    interval = base.mark_rule(color=BLUE, strokeWidth=2).encode(y=alt.Y("low:Q", title="score change"), y2="high:Q")
    middle = base.mark_point(filled=True, color=BLUE, size=50, opacity=1).encode(y="change:Q")
    layered = alt.layer(zero, interval, middle, data=alt.Data(values=points)).properties(width=130, height=110)
    return layered.facet(facet=alt.Facet("task:N", title=None), columns=3).resolve_scale(y="independent")


def _divergences(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """KL with its interval for every plan and task. Zeros are left out, as the axis is logarithmic."""
    return [
        {"task": task["task"], "plan": f"{float(way['way']):.1%}", "kl": way["kl"]}
        | dict(zip(("low", "high"), way["kl_interval"], strict=True))
        for task in tasks
        for way in task["ways"]
        if way.get("kl_interval") and way["kl_interval"][0] > 0
    ]


def _agreement(points: list[dict[str, Any]]) -> Drawn:
    """KL for every task, the lowest first, in a colour for each budget."""
    plans = list(dict.fromkeys(point["plan"] for point in points))
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("task:N", title=None, sort=alt.EncodingSortField("kl", op="mean")).axis(labelAngle=-30),
        xOffset=alt.XOffset("plan:N", sort=plans),
        color=alt.Color("plan:N", sort=plans, title=None, legend=WAYS),
    )
    scale = alt.Scale(type="log")
    interval = base.mark_rule(strokeWidth=2).encode(
        y=alt.Y("low:Q", scale=scale, title="KL, nats per token"), y2="high:Q"
    )
    middle = base.mark_point(filled=True, size=50, opacity=1).encode(y=alt.Y("kl:Q", scale=scale))
    return alt.layer(interval, middle).properties(width=620, height=220)


def _speed(cases: list[dict[str, Any]]) -> Drawn:
    """TPOT, TTFT and the KV cache against the context; of the model's passes where nothing is compiled."""
    every = {one["way"] for case in cases for one in case["results"]}
    points = [
        {"context": one["context"], "way": one["way"], "decode": 1e3 * one["decode_s"]["median"]}
        | {"prefill": one["prefill_s"]["median"], "kv": one["kv_bytes"] and one["kv_bytes"] / 1e6}
        for case in cases
        for one in case["results"]
        if one["batch"] == 1 and one["way"].removesuffix(", model's passes") not in every - {one["way"]}
    ]
    ways = list(dict.fromkeys(point["way"] for point in points))
    base = alt.Chart(alt.Data(values=points)).mark_line(point=True).properties(width=230, height=200)
    base = base.encode(
        x=alt.X("context:Q", title="context, tokens"),
        color=alt.Color("way:N", sort=ways, title=None, legend=WAYS),
    )
    panels = {"decode": "TPOT, ms", "prefill": "TTFT, s", "kv": "KV cache, MB"}
    return alt.hconcat(*(base.encode(y=alt.Y(f"{key}:Q", title=title)) for key, title in panels.items()))
