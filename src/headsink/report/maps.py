"""The map of all heads, and the charts of the head that is selected on it.

All read named data from the page: "heads" (a row for each head), "selected" (layer, head), and what the docstrings name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import altair as alt

from headsink.census.roles import EPSILON
from headsink.report.charts import ABOVE, ERROR_AXIS, Drawn, role_colour
from headsink.utils.colours import BLUE, VERMILION

if TYPE_CHECKING:
    from headsink.census.attention_maps import PooledAttention

Grid = tuple[Sequence[int], int]  # numbers of the layers, and query heads of each
MAP_WIDTH, MAP_HEIGHT = 330, 620  # largest size of a map in pixels; cells that are smaller than LEAST_CELL enlarge it
# Legend values of a nearly logarithmic (symlog) scale from 0 to high.
THIRDS = [f"round(exp({n} / 3 * log(1 + high)) - 1)" for n in range(4)]
WHOLE = "datum.value < 10 ? format(datum.value, '~g') : format(datum.value, 'd')"  # no needless decimals
LEAST_CELL, MOST_CELL = 9, 30
LETTERED = 14  # least size of a cell in pixels in which the letter of its role is readable


def head_map(scale: str, grid: Grid, low: float = 0, high: float = 1) -> Drawn:
    """Layer x head, coloured by `value`. Named data: heads (layer, head, role, value, half, uniform), selected (layer, head)."""
    calculate = {
        "shown": "format(datum.value, '.3~g') + (isValid(datum.half) ? ' ± ' + format(datum.half, '.2~g') : '')",
        "flat": "isValid(datum.uniform) ? format(datum.uniform, '.3~g') : '–'",
    }
    tooltip = [
        *_head_tooltip(),
        alt.Tooltip("shown:N", title="mean ± 95 %"),
        alt.Tooltip("flat:N", title="flat attention"),
    ]
    limits: dict[str, Any] = {"domainMin": alt.expr("low"), "domainMax": alt.expr("high"), "clamp": True}
    values = {"log": alt.expr("[low, sqrt(low * high), high]"), "symlog": alt.expr(f"[{', '.join(THIRDS)}]")}
    legend: dict[str, Any] = {"values": values[scale], "labelExpr": WHOLE} if scale in values else {}
    colour = alt.Color("value:Q", title=None, scale=alt.Scale(type=scale, scheme="viridis", **limits))  # type: ignore[arg-type]
    cells = (
        _cells(grid)
        .transform_calculate(**calculate)
        .encode(color=colour.legend(gradientLength=160, **legend), tooltip=tooltip)
    )
    return _map(grid, cells).add_params(alt.param("low", value=low), alt.param("high", value=high))


def role_map(grid: Grid) -> Drawn:
    """Layer x head, coloured by role, with its letter if cells are large enough. Named data as for `head_map`."""
    cells = _cells(grid).encode(color=role_colour(), tooltip=_head_tooltip())
    letters = (
        alt.Chart(alt.NamedData("heads"))
        .transform_calculate(letter="upper(substring(datum.role, 0, 1))")
        .mark_text(fontSize=10, aria=False, tooltip=False)
        .encode(
            **_axes(grid),
            text="letter:N",
            color=alt.condition(
                "datum.role == 'sink' || datum.role == 'retrieval'", alt.value("white"), alt.value("black")
            ),
        )
    )
    return _map(grid, cells, *([letters] if min(cell(grid)) >= LETTERED else []))


def change_map(grid: Grid, high: float = 1) -> Drawn:
    """Change of each head. Named data: heads (layer, head, value, half, beyond), selected."""
    calculate = {
        "shown": "format(datum.value, '+.3~g') + (isValid(datum.half) ? ' ± ' + format(datum.half, '.2~g') : '')",
        "sides": "format(datum.before, '.3~g') + ' → ' + format(datum.after, '.3~g')",
    }
    colour = alt.Color("value:Q", title=None).scale(
        scheme="purpleorange", reverse=True, domainMin=alt.expr("-high"), domainMax=alt.expr("high"), clamp=True
    )
    tooltip = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("head:O"),
        alt.Tooltip("sides:N", title="means"),
        alt.Tooltip("shown:N", title="change ± 95 %"),
    ]
    cells = _cells(grid).transform_calculate(**calculate).encode(color=colour, tooltip=tooltip)
    beyond = (
        alt.Chart(alt.NamedData("heads"))
        .transform_filter("datum.beyond")
        .mark_point(shape="circle", filled=True, size=14, color="black", aria=False, tooltip=False)
        .encode(**_axes(grid))
    )
    return _map(grid, cells, beyond).add_params(alt.param("high", value=high))


def cell(grid: Grid) -> tuple[float, float]:
    """Width and height of a cell of the maps, in pixels."""
    layers, heads = grid
    return tuple(min(MOST_CELL, max(LEAST_CELL, size)) for size in (MAP_WIDTH // heads, MAP_HEIGHT // len(layers)))  # type: ignore[return-value]


def attention_tiles(attention: PooledAttention) -> Drawn:
    """The tiles of attention maps beside each other, query x key, on a logarithmic scale."""
    tile, charts = attention.tile, []
    for (layer, head), tiles in zip(attention.heads, attention.tiles.tolist(), strict=True):
        rows = [
            {"query": row * tile, "key": column * tile, "attention": value}
            for row, line in enumerate(tiles)
            for column, value in enumerate(line[: row + 1])
        ]
        ends = {"query_end": f"datum.query + {tile}", "key_end": f"datum.key + {tile}"}
        axis, end = alt.Axis(format="d", grid=False), alt.Scale(domain=[0, tile * len(tiles)], nice=False)
        unit = "" if tile == 1 else f", tiles of {tile} × {tile}"
        chart = (
            alt.Chart(alt.Data(values=rows))
            .transform_calculate(**ends)
            .mark_rect(aria=False)
            .encode(
                x=alt.X("key:Q", title=f"key{unit}", axis=axis, scale=end),
                x2="key_end:Q",
                y=alt.Y("query:Q", title="query", axis=axis, scale=end, sort="descending"),
                y2="query_end:Q",
                color=alt.Color("attention:Q").scale(
                    type="log", scheme="yellowgreenblue", domain=[0.001, 1], clamp=True
                ),
            )
            .properties(width=MAP_WIDTH, height=MAP_WIDTH, title=f"Layer {layer}, head {head}")
        )
        charts.append(chart)
    return alt.hconcat(*charts)


def _cells(grid: Grid) -> alt.Chart:
    return alt.Chart(alt.NamedData("heads")).mark_rect(aria=False, cursor="pointer").encode(**_axes(grid))


def _selected(grid: Grid) -> list[alt.Chart]:
    """A frame that is visible on any colour: black around white."""
    frame = alt.Chart(alt.NamedData("selected")).encode(**_axes(grid))
    return [
        frame.mark_rect(fill=None, stroke=colour, strokeWidth=width, aria=False, tooltip=False)
        for colour, width in (("black", 4.5), ("white", 1.5))
    ]


def _axes(grid: Grid) -> dict[str, Any]:
    layers, heads = grid
    axis = alt.Axis(labelAngle=0, labelOverlap=True, ticks=False, domain=False)
    return {
        "x": alt.X("head:O", title="query head", axis=axis, scale=alt.Scale(domain=list(range(heads)))),
        "y": alt.Y("layer:O", title="layer", axis=axis, scale=alt.Scale(domain=list(layers))),
    }


def _map(grid: Grid, *marks: alt.Chart) -> Drawn:
    layers, heads = grid
    width, height = cell(grid)
    return alt.layer(*marks, *_selected(grid)).properties(width=width * heads, height=height * len(layers))


def _head_tooltip() -> list[Any]:
    return [alt.Tooltip("layer:O"), alt.Tooltip("head:O"), alt.Tooltip("role:N")]


def profile() -> alt.Chart:
    """Attention within each distance. Named data: profile (distance, within, line, length, chosen)."""
    lines = {"this head": BLUE, "flat attention": "#777777"}
    return (
        alt.Chart(alt.NamedData("profile"))
        .mark_line(interpolate="monotone", point={"size": 18})
        .encode(
            x=alt.X("distance:Q", title="distance in keys, including the query's own")
            .scale(type="log", base=2, nice=False)
            .axis(format="d", labelOverlap="greedy", labelSeparation=6),
            y=alt.Y("within:Q", title="attention within").scale(domain=[0, 1]).axis(format="%"),
            color=alt.Color("line:N", sort=list(lines), legend=ABOVE).scale(
                domain=list(lines), range=list(lines.values())
            ),
            strokeDash=alt.StrokeDash("line:N", sort=list(lines), legend=None),
            opacity=alt.condition("datum.chosen", alt.value(1), alt.value(0.22)),
            detail="length:N",
            tooltip=["line:N", "length:Q", "distance:Q", alt.Tooltip("within:Q", format=".3f")],
        )
        .properties(width=280, height=190)
    )


def window_errors() -> Drawn:
    """Output error of each window. Named data: errors (window, error, kept, length, chosen)."""
    kept = {"initial tokens": VERMILION, "with secondary sinks": BLUE}
    lines = (
        alt.Chart(alt.NamedData("errors"))
        .mark_line(point={"size": 18})
        .encode(
            x=alt.X("window:O", title="window, keys").axis(labelAngle=0, labelOverlap=True),
            y=alt.Y("error:Q", title="output error").scale(type="log", clamp=True).axis(**ERROR_AXIS),
            color=alt.Color("kept:N", sort=list(kept), legend=ABOVE).scale(
                domain=list(kept), range=list(kept.values())
            ),
            strokeDash=alt.StrokeDash("kept:N", sort=list(kept), legend=None).scale(range=[[5, 3], [1, 0]]),
            opacity=alt.condition("datum.chosen", alt.value(1), alt.value(0.22)),
            detail="length:N",
            tooltip=["kept:N", "length:Q", "window:O", alt.Tooltip("error:Q", format=".2~e")],
        )
    )
    allowed = (
        alt.Chart(alt.Data(values=[{"error": EPSILON}])).mark_rule(strokeDash=[2, 3], color="#333").encode(y="error:Q")
    )
    return alt.layer(lines, allowed).properties(width=280, height=190)
