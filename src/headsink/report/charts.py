"""Charts of a census and of a comparison as Vega-Lite specifications (Altair), for the page and for pictures.

Charts that follow the page's menus read named data ("heads", "selected", ...), which the page provides; `filled` provides it for
pictures. The other charts contain their data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import altair as alt
from torch import Tensor

from headsink.census.first_layer import RULES
from headsink.census.head_statistics import TOKENS
from headsink.census.roles import ROLES
from headsink.census.sink_tokens import tau_evidence
from headsink.census.views import POOLED, number
from headsink.utils.colours import BLUE, GREEN, GREY, ORANGE, ROLE_COLOURS, SKY, VERMILION

if TYPE_CHECKING:
    from headsink.census.results import Census


MASS_COLOURS = {"sink": BLUE, "local": ORANGE, "far": GREY, "learned": GREEN}
Drawn = Any  # an Altair chart, layered or not
CONFIG: dict[str, Any] = {
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#e6e9ee", "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"},
    "legend": {"symbolType": "stroke", "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"},
    "title": {"anchor": "start", "fontSize": 13, "fontWeight": "bold", "offset": 8},
}
FILLED = alt.Legend(orient="top", title=None, symbolType="square", symbolSize=120)
ABOVE = alt.Legend(orient="top", title=None)
ERROR_AXIS: dict[str, Any] = {
    "values": [10.0**-n for n in range(7)],
    "labelExpr": "datum.value < 0.001 ? format(datum.value, '.0e') : format(datum.value, '~g')",
}
WIDE, NARROW = {"width": 540, "height": 200}, {"width": 340, "height": 210}
UNDRAWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\u2028\u2029\ufffe\uffff]")


def spec(chart: Drawn, title: str | list[str] | None = None) -> dict[str, Any]:
    """The Vega-Lite specification of a chart."""
    if title is not None:
        chart = chart.properties(title=title)
    # validation is slow, and Vega-Lite validates too
    return drawable(chart.configure(**CONFIG).to_dict(validate=False))


def drawable(value: Any) -> Any:
    """Replace characters that break the drawing of a chart by a visible escape (`\\u2028`).

    Vega-Lite writes sorted names into expressions, where a line separator ends a string. Characters that XML or UTF-8 does not
    allow make an SVG invalid, and vl-convert then ends the process.
    """
    if isinstance(value, str):
        return UNDRAWABLE.sub(lambda one: one[0].encode("unicode_escape").decode(), value)
    if isinstance(value, dict):
        return {key: drawable(part) for key, part in value.items()}
    return [drawable(part) for part in value] if isinstance(value, list) else value


def fill(spec: dict[str, Any], **data: list[dict[str, Any]]) -> dict[str, Any]:
    """A chart with its named data."""
    return spec | {"datasets": spec.get("datasets", {}) | data}


def masses_by_layer(sink_logits: bool) -> alt.Chart:
    """Attention masses of each layer, mean over its heads. sink_logits: the model has learned sinks. Named data: heads."""
    masses: list[Any] = [mass for mass in MASS_COLOURS if sink_logits or mass != "learned"]
    ranks = " : ".join(f"datum.kind == '{kind}' ? {n}" for n, kind in enumerate(MASS_COLOURS)) + " : 9"
    return (
        alt.Chart(alt.NamedData("heads"))
        .transform_fold(masses, as_=["kind", "mass"])
        .transform_aggregate(mass="mean(mass)", groupby=["layer", "kind"])
        .transform_calculate(rank=ranks)
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer").axis(labelAngle=0, labelOverlap=True),
            y=alt.Y("mass:Q", title="share of attention", stack="zero").scale(domain=[0, 1]).axis(format="%"),
            color=alt.Color("kind:N", sort=masses, legend=FILLED).scale(
                domain=masses, range=[MASS_COLOURS[mass] for mass in masses]
            ),
            order=alt.Order("rank:Q"),
            tooltip=["layer:O", "kind:N", alt.Tooltip("mass:Q", format=".3f")],
        )
        .properties(**WIDE)
    )


def errors_by_layer() -> alt.Chart:
    """Output error of the near window with and without secondary sinks, median over the heads of a layer. Named data: heads."""
    kept = {"error_first": "initial tokens", "error_secondary": "with secondary sinks"}
    return (
        alt.Chart(alt.NamedData("heads"))
        .transform_fold(list(kept), as_=["name", "error"])
        .transform_calculate(
            kept=f"datum.name == 'error_first' ? '{kept['error_first']}' : '{kept['error_secondary']}'",
            error="max(datum.error, 1e-6)",
        )
        .mark_line(point={"size": 22})
        .encode(
            x=alt.X("layer:O", title="layer").axis(labelAngle=0, labelOverlap=True),
            y=alt.Y("median(error):Q", title="output error, median").scale(type="log").axis(**ERROR_AXIS),
            color=alt.Color("kept:N", sort=list(kept.values()), legend=ABOVE).scale(
                domain=list(kept.values()), range=[VERMILION, BLUE]
            ),
            strokeDash=alt.StrokeDash("kept:N", sort=list(kept.values()), legend=None).scale(range=[[5, 3], [1, 0]]),
            tooltip=["layer:O", "kept:N", alt.Tooltip("median(error):Q", format=".2~e")],
        )
        .properties(**WIDE)
    )


def pairs(layers: Sequence[int]) -> alt.Chart:
    """P(sink in layer b | sink in layer a) minus the base rate of b. layers: their numbers.

    Named data: pairs (a, b, found, base, lift).
    """
    side = max(180, len(layers) * max(3, min(14, 420 // len(layers))))  # room for the axis titles in any font
    axis = alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=4, ticks=False, domain=False)
    every = alt.Scale(domain=list(layers))
    return (
        alt.Chart(alt.NamedData("pairs"))
        .mark_rect(aria=False)
        .encode(
            x=alt.X("b:O", title="sink in layer b ...", axis=axis, scale=every),
            y=alt.Y("a:O", title="... given a sink in layer a", axis=axis, scale=every),
            color=alt.Color("lift:Q", title="P − base rate").scale(
                scheme="purpleorange", reverse=True, domain=[-1, 1], domainMid=0
            ),
            tooltip=[
                alt.Tooltip("a:O", title="layer a"),
                alt.Tooltip("b:O", title="layer b"),
                alt.Tooltip("found:Q", title="P(b | a)", format=".2f"),
                alt.Tooltip("base:Q", title="base rate of b", format=".2f"),
                alt.Tooltip("lift:Q", title="difference", format="+.2f"),
            ],
        )
        .properties(width=side, height=side)
    )


def sinks_by_length(census: Census) -> alt.Chart:
    """Share of heads that are sinks at each length, by the fair scores and by the legacy score."""
    rows = [
        {"length": length, "rule": rule, "share": float((census.score(score, length) >= least).double().mean())}
        for length in census.lengths
        for rule, (score, least) in RULES.items()
    ]
    colour = alt.Color("rule:N", sort=list(RULES), legend=ABOVE).scale(range=[BLUE, SKY, VERMILION, ORANGE])
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("length:Q", title="tokens").scale(type="log", base=2),
            y=alt.Y("share:Q", title="heads that are sinks").axis(format="%").scale(domainMin=0),
            color=colour,
            strokeDash=alt.StrokeDash("rule:N", sort=list(RULES), legend=None),
            tooltip=["rule:N", "length:Q", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(**NARROW)
    )


def norms_by_layer(census: Census, length: int) -> alt.Chart:
    """Value and key norms of the first token and of the secondary sinks, relative to the mean of all keys."""
    names = {"first_value": "first token, value", "first_key": "first token, key"}
    names |= {"secondary_value": "secondary sinks, value", "secondary_key": "secondary sinks, key"}
    tokens = census.samples("tokens", length)
    rows = [
        {"layer": layer, "norm": norm if norm == norm else None, "of": title}  # NaN leaves a gap
        for name, title in names.items()
        for layer, norm in zip(
            census.layers, tokens[..., list(TOKENS).index(name)].nanmean((0, 2)).tolist(), strict=True
        )
    ]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point={"size": 22})
        .encode(
            x=alt.X("layer:O", title="layer").axis(labelAngle=0, labelOverlap=True),
            y=alt.Y("norm:Q", title="norm / mean norm").scale(zero=True),
            color=alt.Color("of:N", sort=list(names.values()), legend=ABOVE).scale(
                range=[VERMILION, ORANGE, BLUE, SKY]
            ),
            strokeDash=alt.StrokeDash("of:N", sort=list(names.values()), legend=None),
            tooltip=["layer:O", "of:N", alt.Tooltip("norm:Q", format=".2f")],
        )
        .properties(**WIDE)
    )


def tau(census: Census, length: int) -> Drawn | None:
    """Attention per key by its value norm. Keys are sinks above the level of flat attention."""
    rows = [row for row in tau_evidence(census, length) if row["density"]]
    if not rows:
        return None
    used = [{"tau": census.settings["limits"]["tau"], "density": 1}]
    line = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True, color=BLUE)
        .encode(
            x=alt.X("tau:Q", title="value norm up to, relative to the median").scale(domain=[0, 1]),
            y=alt.Y("density:Q", title="attention per key, × flat").scale(type="log").axis(tickCount=4, format="~g"),
            tooltip=[
                "tau:Q",
                alt.Tooltip("density:Q", title="× flat", format=".3~g"),
                alt.Tooltip("keys:Q", title="keys below", format=".1f"),
                alt.Tooltip("attention:Q", title="attention below", format=".3f"),
            ],
        )
    )
    flat = alt.Chart(alt.Data(values=used)).mark_rule(strokeDash=[2, 3], color="#333").encode(y="density:Q")
    chosen = alt.Chart(alt.Data(values=used)).mark_rule(color=VERMILION).encode(x="tau:Q")
    return alt.layer(flat, chosen, line).properties(**NARROW)


def required_windows(census: Census) -> alt.Chart:
    """Share of KV heads that need at most a window of each size, at every length."""
    rows = []
    for length in census.lengths:
        for kept, name in (("secondary", "with secondary sinks"), ("first", "initial tokens")):
            needed = census.required_window(length, heads="kv", kept=kept).flatten().sort().values
            for window in sorted({0, *(2**k for k in range(3, length.bit_length())), length}):
                share = float((needed <= window).double().mean())
                rows.append({"length": length, "kept": name, "window": window, "share": share})
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line()
        .encode(
            x=alt.X("window:Q", title="window, keys")
            .scale(type="symlog", constant=8, nice=False)
            .axis(values=[0, *(2**k for k in range(4, 24, 2))]),
            y=alt.Y("share:Q", title="KV heads that need no more").scale(domain=[0, 1]).axis(format="%"),
            color=alt.Color("length:O", title="tokens").scale(scheme="viridis", reverse=True),
            strokeDash=alt.StrokeDash("kept:N", title="kept with it", sort=["with secondary sinks", "initial tokens"]),
            tooltip=["length:O", "kept:N", "window:Q", alt.Tooltip("share:Q", format=".0%")],
        )
        .properties(width=400, height=200)
    )


def exponents(census: Census) -> alt.Chart | None:
    """Exponent by which the window of a KV head grows with the length: 0 is constant, 1 proportional."""
    law = census.window_law()
    if law is None:
        return None
    scale, exponent = law
    last = census.required_window(census.lengths[-1], heads="kv")
    rows = each({"exponent": exponent, "scale": scale, "window": last}, census.layers)
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, size=45, opacity=0.85)
        .encode(
            x=alt.X("layer:O", title="layer").axis(labelAngle=0, labelOverlap=True),
            y=alt.Y("exponent:Q", title="exponent of the length"),
            color=alt.Color("window:Q", title=f"window at {census.lengths[-1]} tokens")
            .scale(type="symlog", scheme="viridis", domain=[0, census.lengths[-1]])
            .legend(orient="top", gradientLength=160, format="d", values=thirds(census.lengths[-1])),
            tooltip=[
                "layer:O",
                alt.Tooltip("head:O", title="KV head"),
                alt.Tooltip("exponent:Q", format=".2f"),
                alt.Tooltip("scale:Q", format=".3~g"),
                alt.Tooltip("window:Q", title=f"window at {census.lengths[-1]}", format=".0f"),
            ],
        )
        .properties(**WIDE)
    )


def roles_by_text(census: Census) -> alt.Chart:
    """Number of heads with each role on each kind of text, at every length."""
    rows = [
        {"text": domain or POOLED, "length": length, "role": role, "heads": count}
        for length in census.lengths
        for domain in (None, *census.domains)
        if census.has(length, domain)
        for role, count in Counter(chain(*census.roles(length, domain))).items()
    ]
    order = f"indexof({list(ROLES)}, datum.role)"
    return (
        alt.Chart(alt.Data(values=rows))
        .transform_calculate(rank=order, letter="upper(substring(datum.role, 0, 1))")
        .mark_bar()
        .encode(
            y=alt.Y("text:N", title=None, sort=[POOLED, *census.domains]),
            x=alt.X("heads:Q", title="query heads").axis(tickCount=4),
            color=role_colour(),
            order="rank:Q",
            tooltip=["text:N", "length:Q", "role:N", "heads:Q"],
        )
        .properties(width=170, height=alt.Step(18))
        .facet(facet=alt.Facet("length:O", title="tokens"), columns=4)
    )


def same_roles(census: Census, length: int) -> Drawn:
    """Share of heads with the same role on two kinds of text."""
    domains = [domain for domain in census.domains if census.has(length, domain)]
    roles = {domain: list(chain(*census.roles(length, domain))) for domain in domains}
    rows = [
        {"a": a, "b": b, "share": sum(x == y for x, y in zip(roles[a], roles[b], strict=True)) / len(roles[a])}
        for a in domains
        for b in domains
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("a:N", title=None, sort=domains).axis(labelAngle=0, ticks=False, domain=False),
        y=alt.Y("b:N", title=None, sort=domains).axis(ticks=False, domain=False),
        tooltip=["a:N", "b:N", alt.Tooltip("share:Q", format=".0%")],
    )
    colour = alt.Color("share:Q", title="same role").scale(scheme="viridis", domain=[0, 1]).legend(format="%")
    ink = alt.condition("datum.share < 0.6", alt.value("white"), alt.value("black"))
    text = base.mark_text().encode(text=alt.Text("share:Q", format=".0%"), color=ink)
    return alt.layer(base.mark_rect().encode(color=colour), text).properties(width=alt.Step(58), height=alt.Step(30))


def role_colour() -> alt.Color:
    return alt.Color(
        "role:N", title="role", sort=list(ROLES), legend=alt.Legend(symbolType="square", symbolSize=120)
    ).scale(domain=list(ROLES), range=[ROLE_COLOURS[name] for name in ROLES])


def thirds(high: float) -> list[int]:
    """Evenly spaced values of a nearly logarithmic (symlog) scale from 0 to high, for its legend."""
    return [round((1 + high) ** (n / 3) - 1) for n in range(4)]


def each(columns: dict[str, Tensor], layers: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every layer and head. columns: [layers, heads] each. layers: their numbers."""
    heads = next(iter(columns.values())).shape[1]
    return [
        {"layer": layer, "head": head} | {name: number(column[row, head]) for name, column in columns.items()}
        for row, layer in enumerate(layers)
        for head in range(heads)
    ]
