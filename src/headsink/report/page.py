"""Write the report: one HTML file that needs no network, and the maps as PNG."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2
import vl_convert

from headsink.census.transfer import sentence
from headsink.report import charts

if TYPE_CHECKING:
    import altair as alt

    from headsink.census.census import Census

LEAST_SHARE = 0.0005  # of all attention, from which a token is listed
PIXELS = 2.0  # of a picture, per CSS pixel


def write_report(census: Census, path: Path) -> None:
    """Write `report.html`. Text that comes from models or prompts is escaped."""
    rows = charts.head_rows(census)
    longest = census.lengths[-1]
    figures = {
        "maps": charts.interactive_maps(rows, census),
        "layers": charts.masses_by_layer(rows, longest),
        "errors": charts.errors_by_layer(rows, longest),
        "lengths": charts.sinks_by_length(census),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("headsink.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["share"] = share
    environment.filters["p"] = p_value
    page = environment.get_template("page.html.j2").render(
        settings=census.settings,
        domains=census.domains,
        lengths=census.lengths,
        specs={name: json.loads(chart.to_json()) for name, chart in figures.items()},
        scripts=cast(Any, vl_convert).javascript_bundle(),
        roles=role_counts(rows, longest),
        sink_tokens=sink_tokens(census, longest),
        answers={length: census.first_question(length) for length in census.lengths},
        answer=f"At {longest} tokens. {sentence(census.first_question(longest)[0])}",
    )
    path.write_text(page, encoding="utf-8")


def write_pictures(census: Census, folder: Path) -> None:
    """Write the maps of the pooled texts, `sink-<length>.png` and `roles-<length>.png`."""
    rows = charts.head_rows(census)
    for length in census.lengths:
        kept = [row for row in rows if row["length"] == length and row["domain"] == charts.POOLED]
        name = census.settings["model"]["name"]
        _png(
            charts.head_map(kept, "sink", f"Attention to sink tokens, {name}, {length} tokens"),
            folder / f"sink-{length}.png",
        )
        _png(charts.role_map(kept, f"Roles of the heads, {name}, {length} tokens"), folder / f"roles-{length}.png")


def _png(chart: alt.Chart, path: Path) -> None:
    path.write_bytes(vl_convert.vegalite_to_png(chart.to_json(), scale=PIXELS))


def share(value: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "–" if value is None else f"{value:.0%}"


def p_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def role_counts(rows: list[dict[str, Any]], length: int) -> dict[str, int]:
    """How many heads have each role at one length, all texts together, most first."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["length"] == length and row["domain"] == charts.POOLED:
            counts[row["role"]] += 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def sink_tokens(census: Census, length: int, most: int = 12) -> list[dict[str, Any]]:
    """The tokens that draw most attention over all heads and texts, with the share of all attention that each draws.

    `first` marks the first token of a text, the sink that everybody knows; the others are counted by what they say.
    """
    drawn: dict[tuple[str, bool], float] = defaultdict(float)
    heads: dict[tuple[str, bool], set[tuple[int, int]]] = defaultdict(set)
    total = 0
    for row in census.rows:
        if row["length"] != length:
            continue
        total += 1
        for position, token, attention in zip(
            row["top_positions"], row["top_tokens"], row["top_attention"], strict=True
        ):
            key = (token, position == 0)
            drawn[key] += attention
            heads[key].add((row["layer"], row["head"]))
    return [
        {"token": token, "first": first, "share": drawn_share / total, "heads": len(heads[token, first])}
        for (token, first), drawn_share in sorted(drawn.items(), key=lambda item: -item[1])[:most]
        if drawn_share / total >= LEAST_SHARE
    ]
