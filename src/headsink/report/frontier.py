"""The quality frontier as a page: KL and retrieval accuracy against the KV budget."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import altair as alt

from headsink.calibration.frontier import Frontier
from headsink.evaluation.options import FRONTIER
from headsink.report.assets import environment, write_picture
from headsink.report.charts import CONFIG, Drawn
from headsink.utils.colours import BLUE, GREY, VERMILION
from headsink.utils.files import new_folder

SIZE: dict[str, Any] = {"width": 320, "height": 240}


def write_frontier(frontier: Frontier, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a folder, atomically: frontier.json, every plan, and the chart as frontier.html (without network), .png and .svg.

    force: also replace files with the same names that headsink did not write.
    """
    with new_folder(folder, FRONTIER, force) as part:
        frontier.write(part)
        write_chart(frontier.to_dict(), part)
    return Path(folder)


def write_chart(found: dict[str, Any], folder: Path) -> None:
    """Write frontier.html, .png and .svg to a folder that is there; found: as by `Frontier.to_dict`."""
    spec = frontier_chart(found).configure(**CONFIG).to_dict(validate=False)
    write_picture(folder / "frontier", spec)
    page = (
        environment().get_template("frontier.html.j2").render(specs={"frontier": spec}, advice=found["advice"], data="")
    )
    (folder / "frontier.html").write_text(page, encoding="utf-8")


def frontier_chart(found: dict[str, Any]) -> Drawn:
    """KL of text with its interval, and retrieval accuracy, over the share of the KV cache that is kept."""
    rows = [_row(point) for point in found["points"]]
    kept = alt.X("kept:Q", title="KV entries kept", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    tooltip = [
        alt.Tooltip("budget:Q", title="budget", format=".1%"),
        alt.Tooltip("kl:Q", title="KL, nats", format=".4f"),
        alt.Tooltip("top1:Q", title="same top token", format=".1%"),
        alt.Tooltip("nll_change:Q", title="delta NLL", format="+.4f"),
        alt.Tooltip("answers:N", title="retrieval accuracy"),
    ]
    base = alt.Chart(alt.Data(values=rows))
    log = alt.Scale(type="log", nice=False)
    kl = base.mark_line(color=BLUE, point=alt.OverlayMarkDef(color=BLUE)).encode(
        x=kept, y=alt.Y("kl:Q", title="KL of text, nats per token", scale=log), tooltip=tooltip
    )
    interval = base.mark_rule(color=BLUE, opacity=0.5).encode(x=kept, y=alt.Y("low:Q", scale=log), y2="high:Q")
    right = base.mark_line(color=BLUE, point=alt.OverlayMarkDef(color=BLUE)).encode(
        x=kept,
        y=alt.Y("right:Q", title="retrieval accuracy", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        tooltip=tooltip,
    )
    full_cache = base.mark_rule(color=GREY, strokeDash=[4, 3]).encode(y="mean(right_full):Q")
    panels = [kl + interval, right + full_cache]
    if found["least_sound_budget"] is not None:
        limit = alt.Chart(alt.Data(values=[{"x": found["least_sound_budget"]}]))
        panels = [panel + limit.mark_rule(color=VERMILION, strokeDash=[2, 2]).encode(x="x:Q") for panel in panels]
    chart = alt.hconcat(*(panel.properties(**SIZE) for panel in panels))
    return chart.properties(title=[found["advice"], "Grey: full cache. Bars: 95 % intervals."])


def _row(point: dict[str, Any]) -> dict[str, Any]:
    total = sum(form["asked"] for form in point["retrieval"]) or 1
    right, right_full = (sum(form[name] for form in point["retrieval"]) for name in ("right_plan", "right_full"))
    return {
        "budget": point["budget"],
        "kept": point["kept"],
        "kl": max(point["kl"], 1e-6),  # lower end of a logarithmic axis
        "low": max(point["kl_interval"][0], 1e-6),
        "high": max(point["kl_interval"][1], 1e-6),
        "top1": point["top1"],
        "nll_change": point["nll_plan"] - point["nll_full"],
        "right": right / total,
        "right_full": right_full / total,
        "answers": f"{right}/{total} (full cache: {right_full}/{total})",
    }
