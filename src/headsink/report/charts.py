"""The charts of a census, as Vega-Lite by Altair: the same ones on the page and as pictures."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import altair as alt

from headsink.census.roles import ROLES, role
from headsink.census.transfer import RULES

if TYPE_CHECKING:
    from headsink.census.census import Census

# Okabe and Ito's colours, which the colour-blind can tell apart.
ROLE_COLOURS = {"sink": "#0072B2", "local": "#E69F00", "mixed": "#56B4E9", "diffuse": "#CCCCCC", "retrieval": "#D55E00"}
STATISTICS = {
    "sink": "attention to sink tokens",
    "first": "attention to the first token",
    "local": "attention to the last keys",
    "far": "attention far away",
    "legacy": "legacy score (row 0 counted)",
    "error_first": "error if only first tokens + window stay",
    "error_floating": "error if floating sinks stay too",
    "output": "size of the head's output",
}
POOLED = "all texts"
CELL = 20  # pixels of a head on the maps


def head_rows(census: Census) -> list[dict[str, Any]]:
    """Rows for the maps: means over texts, per domain and pooled; one row per head and length."""
    model = census.settings["model"]
    rows = []
    for length in census.lengths:
        for domain in [POOLED, *census.domains]:
            of = None if domain == POOLED else domain
            columns = {
                name: census.score(name, length, of)
                for name in (*STATISTICS, "far_peak", "uniform_first", "uniform_legacy")
            }
            roles = _roles(columns)
            for layer in range(model["layers"]):
                for head in range(model["query_heads"]):
                    row = {"length": length, "domain": domain, "layer": layer, "head": head, "role": roles[layer][head]}
                    rows.append(row | {name: round(float(column[layer, head]), 4) for name, column in columns.items()})
    return rows


def _roles(columns: dict[str, Any]) -> list[list[str]]:
    parts = [columns[name].tolist() for name in ("sink", "local", "far", "far_peak")]
    return [[role(*masses) for masses in zip(*layer, strict=True)] for layer in zip(*parts, strict=True)]


def head_map(rows: list[dict[str, Any]], statistic: str, title: str) -> alt.Chart:
    """Layer x head, coloured by one statistic; a still picture."""
    return (
        alt.Chart(alt.Data(values=rows), title=title)
        .mark_rect()
        .encode(
            **_axes(),
            color=alt.Color(f"{statistic}:Q", title=None, scale=alt.Scale(scheme="viridis", domain=[0, 1], clamp=True)),
        )
        .properties(width=alt.Step(CELL), height=alt.Step(CELL))
    )


def role_map(rows: list[dict[str, Any]], title: str) -> alt.Chart:
    """Layer x head, coloured by role; a still picture."""
    return (
        alt.Chart(alt.Data(values=rows), title=title)
        .mark_rect()
        .encode(**_axes(), color=_role_colour())
        .properties(width=alt.Step(CELL), height=alt.Step(CELL))
    )


def interactive_maps(rows: list[dict[str, Any]], census: Census) -> alt.HConcatChart:
    """Both maps with menus for the length, the text and the statistic."""
    domains = [POOLED, *census.domains]
    length = alt.param(
        "length", value=census.lengths[-1], bind=alt.binding_select(options=census.lengths, name="length ")
    )
    domain = alt.param("domain", value=POOLED, bind=alt.binding_select(options=domains, name="text "))
    labels = list(STATISTICS.values())
    statistic = alt.param(
        "statistic",
        value="sink",
        bind=alt.binding_select(options=list(STATISTICS), labels=labels, name="statistic "),
    )
    base = (
        alt.Chart()
        .transform_filter("datum.length == length && datum.domain == domain")
        .transform_calculate(shown="datum[statistic]")
        .properties(width=alt.Step(CELL), height=alt.Step(CELL))
    )
    tooltip = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("head:O"),
        alt.Tooltip("role:N"),
        *(alt.Tooltip(f"{name}:Q", title=title, format=".3f") for name, title in STATISTICS.items()),
        alt.Tooltip("uniform_first:Q", title="first token, if attention were flat", format=".3f"),
        alt.Tooltip("uniform_legacy:Q", title="legacy score, if attention were flat", format=".3f"),
    ]
    scale = alt.Scale(scheme="viridis", domainMin=0)
    values = base.mark_rect().encode(**_axes(), tooltip=tooltip, color=alt.Color("shown:Q", title=None, scale=scale))
    roles = base.mark_rect().encode(**_axes(), tooltip=tooltip, color=_role_colour())
    return (
        alt.hconcat(values, roles, data=alt.Data(values=rows))
        .add_params(length, domain, statistic)
        .resolve_scale(color="independent")
    )


def masses_by_layer(rows: list[dict[str, Any]], length: int) -> alt.Chart:
    """Where the attention of each layer goes, mean over its heads, at one length, all texts."""
    kinds = {"sink": "#0072B2", "local": "#E69F00", "far": "#999999"}
    layers: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["length"] == length and row["domain"] == POOLED:
            layers[row["layer"]].append(row)
    means = [
        {"layer": layer, "kind": kind, "rank": rank, "mass": sum(row[kind] for row in heads) / len(heads)}
        for layer, heads in layers.items()
        for rank, kind in enumerate(kinds)
    ]
    return (
        alt.Chart(alt.Data(values=means), title=f"Where attention goes, by layer, {length} tokens")
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("mass:Q", title="share of attention", stack="zero", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("kind:N", title=None, sort=list(kinds)).scale(
                domain=list(kinds), range=list(kinds.values())
            ),
            order=alt.Order("rank:Q"),
            tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("kind:N"), alt.Tooltip("mass:Q", format=".3f")],
        )
        .properties(width=560, height=200)
    )


def sinks_by_length(census: Census) -> alt.Chart:
    """Share of heads called sinks at each length: by the fair scores and by the legacy one, and by it on flat attention."""
    rows = []
    for length in census.lengths:
        for rule, (score, least) in RULES.items():
            share = (census.score(score, length) >= least).double().mean()
            rows.append({"length": length, "rule": rule, "share": float(share)})
    return (
        alt.Chart(alt.Data(values=rows), title="Heads called sinks, by score and length")
        .mark_line(point=True)
        .encode(
            x=alt.X("length:Q", title="tokens", scale=alt.Scale(type="log")),
            y=alt.Y("share:Q", title="share of heads", axis=alt.Axis(format="%"), scale=alt.Scale(domainMin=0)),
            color=alt.Color("rule:N", title=None, sort=list(RULES)).scale(
                range=["#0072B2", "#56B4E9", "#D55E00", "#E69F00"]
            ),
            strokeDash=alt.StrokeDash("rule:N", sort=list(RULES), legend=None),
            tooltip=[alt.Tooltip("rule:N"), alt.Tooltip("length:Q"), alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=360, height=200)
    )


def errors_by_layer(rows: list[dict[str, Any]], length: int) -> alt.Chart:
    """What a window of 128 costs with and without floating sinks: median over the heads of a layer."""
    names = {"error_first": "first 4 tokens + last 128", "error_floating": "with floating sinks"}
    kept = [
        {"layer": row["layer"], "kept": title, "error": max(row[name], 1e-4)}
        for row in rows
        if row["length"] == length and row["domain"] == POOLED
        for name, title in names.items()
    ]
    return (
        alt.Chart(alt.Data(values=kept), title=f"Error of the head's output, by layer, {length} tokens")
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("median(error):Q", title="squared, relative to the layer's", scale=alt.Scale(type="log")),
            color=alt.Color("kept:N", title="kept", sort=list(names.values())).scale(range=["#D55E00", "#0072B2"]),
            tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("kept:N"), alt.Tooltip("median(error):Q", format=".4f")],
        )
        .properties(width=560, height=200)
    )


def _axes() -> dict[str, Any]:
    return {
        "x": alt.X("head:O", title="query head", axis=alt.Axis(labelAngle=0)),
        "y": alt.Y("layer:O", title="layer"),
    }


def _role_colour() -> alt.Color:
    return alt.Color("role:N", title="role", sort=list(ROLES)).scale(
        domain=list(ROLES), range=[ROLE_COLOURS[name] for name in ROLES]
    )
