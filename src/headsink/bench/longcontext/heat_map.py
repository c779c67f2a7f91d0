"""The heat map of the needles suite: scores by length and depth, a panel for each way."""

from __future__ import annotations

import statistics
from typing import Any

import altair as alt

from headsink.report.charts import spec


def heat_map(results: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """Return a chart as Vega-Lite from results of the suite (run.py)."""
    cells: dict[tuple[str, int, int], list[float]] = {}
    for one in results:
        for record in one["records"]:
            for way, score in record["score"].items():
                cells.setdefault((way, one["length"], record["depth"]), []).append(score)
    values = [
        {"way": way, "length": length, "depth": depth, "score": statistics.fmean(scores)}
        for (way, length, depth), scores in cells.items()
    ]
    ways = list(dict.fromkeys(way for way, _, _ in cells))
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_rect()
        .encode(
            x=alt.X("length:O", title="tokens"),
            y=alt.Y("depth:O", title="depth of the needle, %"),
            color=alt.Color("score:Q", title="score", scale=alt.Scale(domain=[0, 1], scheme="viridis")),
        )
        .properties(width=120, height=180)
        .facet(facet=alt.Facet("way:N", title=None, sort=ways), columns=4)
    )
    return spec(chart, f"{model}: needles found")
