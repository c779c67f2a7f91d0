"""Write the report of a census: one HTML file that needs no network, and every chart as PNG and SVG."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from headsink.census import first_view, roles
from headsink.census.first_layer import sentence
from headsink.census.head_statistics import Thresholds, distances, windows
from headsink.census.options import CENSUS
from headsink.census.roles import EPSILON, ROLES
from headsink.census.sink_tokens import drawing_tokens, secondary_tokens, stability, tau_evidence
from headsink.census.views import (
    POOLED,
    STATISTICS,
    View,
    near_window,
    share_of_room,
    statistics,
    token_views,
    top_keys,
    view,
)
from headsink.errors import HeadsinkError
from headsink.report import attention, charts, maps
from headsink.report.assets import environment, to_svg, write_picture
from headsink.utils.files import new_folder
from headsink.utils.format import capital
from headsink.utils.pack import one_byte, pack, two_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headsink.census.results import Census
    from headsink.plan.plan import Plan


SHAPES = ("linear", "log", "symlog")  # scales of the maps
OWN_DATA = {
    "windows": "KV heads by the window that they need",
    "law": "How the window grows with the length",
    "norms": "Norms of sink tokens, {last} tokens",
    "tau": "Attention per key by value norm, {last} tokens",
    "lengths": "Heads that are sinks, by fair and legacy scores",
    "roles-by-text": "Roles by kind of text and length",
    "same-roles": "Heads with the same role on two kinds of text, {last} tokens",
}


def write_report(
    census: Census,
    folder: str | os.PathLike[str],
    *,
    model: PreTrainedModel | None = None,
    maps: attention.Maps = "auto",
    plan: Plan | None = None,
    force: bool = False,
) -> Path:
    """Write a census folder, atomically: the files of `Census.save`, report.html (without network), and every chart as PNG and
    SVG.

    model: the one of the census; the report then has attention maps, which takes a forward pass over one text of each kind. maps:
    the heads that can be read token by token, as (layer, query head); "auto": those that stand out; "none": no maps. plan: mark
    the tokens that each KV head keeps and evicts under it. force: also replace files with the same names that headsink did not
    write. Raises HeadsinkError if the model is not the census's, for heads that it does not have, and for a plan without a model.
    """
    if plan is not None and (model is None or maps == "none"):
        raise HeadsinkError(
            "plan: it is marked in the texts of the attention maps; give the model too, and do not leave out maps"
        )
    found = {} if model is None else attention.report_maps(model, census, maps, plan)
    with new_folder(folder, CENSUS, force) as part:
        census.write(part)
        write_page(census, part / "report.html", found)
        write_pictures(census, part)
    return Path(folder)


def write_page(census: Census, path: Path, text_maps: Mapping[int, attention.TextMaps] = MappingProxyType({})) -> None:
    """Write `report.html`. text_maps: attention maps of texts of `token_views`. Text of models and prompts is escaped."""
    last, grid, own = census.lengths[-1], _grid(census), _own_data(census)
    pooled = {length: view(census, length, None) for length in census.lengths}
    shown = first_view.first_view(census, pooled, statistics(census))
    menu = {f"map-{scale}": maps.head_map(scale, grid) for scale in SHAPES} | {
        "map-role": maps.role_map(grid),
        "profile": maps.profile(),
        "window": maps.window_errors(),
        "layers": charts.masses_by_layer(_sink_logits(census) is not None),
        "errors": charts.errors_by_layer(),
        "pairs": charts.pairs(census.layers),
    }
    specs = {name: charts.spec(chart) for name, chart in (menu | own).items()}
    text = (
        environment()
        .get_template("census.html.j2")
        .render(
            settings=census.settings,
            layers=census.layers,
            domains=census.domains,
            lengths=census.lengths,
            last=last,
            limits=census.settings["limits"],
            epsilon=EPSILON,
            data=_data(census, pooled),
            shaded={
                text: _token_data(census, text, *room, text_maps.get(text))
                for text, room in token_views(census).items()
            },
            mapped=bool(text_maps),
            planned=any(of.kept is not None for of in text_maps.values()),
            detailed=_detailed(census, text_maps),
            specs=specs,
            boxes=_boxes(census, specs, pooled, shown),
            first=shown,
            columns=first_view.COLUMNS,
            statistics={name: STATISTICS[name].title for name in statistics(census)},
            drawing=drawing_tokens(census, last),
            secondary=secondary_tokens(census, last),
            stability={length: stability(census, length) for length in census.lengths},
            taus=tau_evidence(census, last),
            windows=_windows(census),
            law=_law(census),
            sink_logits=_sink_logits(census),
            answers={length: census.first_question(length) for length in census.lengths},
            answer=sentence(census.first_question(last)[0]),
        )
    )
    path.write_text(text, encoding="utf-8")


def _boxes(
    census: Census, specs: dict[str, Any], pooled: dict[int, View], shown: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The first picture of every chart of the page, by the name of its element. All maps share one element."""
    last = census.lengths[-1]
    view_of_all, layer, head = pooled[last], shown["layer"], shown["head"]
    rows = [row | {"value": row["sink"]} for row in view_of_all.rows(census.layers)]
    data = {
        "heads": rows,
        "selected": [{"layer": layer, "head": head}],
        "pairs": _pair_rows(view_of_all, census.layers),
        **first_view.head_charts(census, pooled, layer, head),
    }
    pictures = {name: draw(name, charts.fill(spec, **data)) for name, spec in specs.items()}
    every = [pictures.pop(f"map-{kind}") for kind in (*SHAPES, "role")]
    size = {side: max(one[side] for one in every) for side in ("width", "height")}
    return pictures | {"map": every[0] | size}


def draw(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A chart with its data as part of a page: SVG, width and height."""
    svg = to_svg(spec)
    sides = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    assert sides is not None
    svg = re.sub(r'(\bid="|url\(#)(?=(?:clip|gradient_)\d)', rf"\1{name}-", svg)  # ids must be unique on the page
    return {"svg": Markup(svg), "width": float(sides[1]), "height": float(sides[2])}


def write_pictures(census: Census, folder: Path) -> None:
    """Write every chart of all texts together as `figure-<name>.png` and `.svg`. Charts of single heads are only on the page."""
    for name, spec in _pictures(census):
        write_picture(folder / f"figure-{name}", spec)


def _pictures(census: Census) -> Iterator[tuple[str, dict[str, Any]]]:
    name, grid, last = census.settings["model"]["name"], _grid(census), census.lengths[-1]
    for length in census.lengths:
        pooled, at = view(census, length, None), f"{name}, {length} tokens"
        rows = pooled.rows(census.layers)
        shown = [n for n in statistics(census) if length == last or n == "sink"]
        for statistic in shown:
            meaning = STATISTICS[statistic]
            data = [row | {"value": row[statistic]} for row in rows]
            high = _high(statistic, length, [pooled])
            chart = maps.head_map(meaning.scale, grid, meaning.low, high)
            spec = charts.spec(
                chart,
                [capital(meaning.title.replace("the near window", f"a window of {near_window(census, length)}")), at],
            )
            yield f"{statistic.replace('_', '-')}-{length}", charts.fill(spec, heads=data, selected=[])
        charts_of_length = {"roles": (maps.role_map(grid), "Roles of the heads")}
        if length == last:
            masses = charts.masses_by_layer(_sink_logits(census) is not None)
            charts_of_length["layers"] = masses, "Where attention goes"
            charts_of_length["errors"] = (
                charts.errors_by_layer(),
                f"Output error of a window of {near_window(census, length)} keys",
            )
            charts_of_length["pairs"] = (
                charts.pairs(census.layers),
                "P(sink in layer b | sink in layer a) − base rate of b",
            )
        for key, (chart, title) in charts_of_length.items():
            spec = charts.spec(chart, [title, at])
            yield f"{key}-{length}", charts.fill(spec, heads=rows, selected=[], pairs=_pair_rows(pooled, census.layers))
    for key, chart in _own_data(census).items():
        yield key, charts.spec(chart, [OWN_DATA[key].format(last=last), name])


def _own_data(census: Census) -> dict[str, Any]:
    """The charts that do not depend on the menus."""
    last = census.lengths[-1]
    own = {
        "windows": charts.required_windows(census),
        "law": charts.exponents(census),
        "norms": charts.norms_by_layer(census, last),
        "tau": charts.tau(census, last),
        "lengths": charts.sinks_by_length(census),
        "roles-by-text": charts.roles_by_text(census),
        "same-roles": charts.same_roles(census, last) if len(census.domains) > 1 else None,
    }
    return {name: chart for name, chart in own.items() if chart is not None}


# data in the page


def _data(census: Census, pooled: dict[int, View]) -> str:
    """The numbers of every head and the words of the texts, packed (`views.packed`)."""
    every = [None, *census.domains]
    has = {n: [d for d, domain in enumerate(every) if census.has(n, domain)] for n in census.lengths}
    views = {(n, d): view(census, n, every[d]) if d else pooled[n] for n, domains in has.items() for d in domains}
    short = ("profile", "errors") if share_of_room(census) < 1 else ()  # points of charts
    arrays = {
        f"{n}.{d}.{name}": two_figures(array) if name in short else array
        for (n, d), one in views.items()
        for name, array in vars(one).items()
    }
    sliding = census.settings["model"]["sliding"]
    for n in census.lengths:
        for window in set(sliding):
            arrays[f"flat.{n}.{window or 0}.keys"] = first_view.flat_keys(n, window)
            arrays[f"flat.{n}.{window or 0}.profile"] = first_view.flat_profile(n, window)
    words = {token: index for index, token in enumerate(census.vocabulary)}
    texts = []
    for number, text in enumerate(census.settings["texts"]):
        ids = census.arrays[f"{number}.ids"]
        arrays[f"ids.{number}"] = ids.new_tensor([words[token] for token in ids.tolist()])
        lengths = [n for n in census.lengths if f"{number}.{n}.top" in census.arrays]
        for n in lengths:
            arrays |= {f"{number}.{n}.{name}": array for name, array in top_keys(census, number, n).items()}
        texts.append({"name": f"{text['domain']} {text['number']}", "domain": text["domain"], "lengths": lengths})
    return pack(
        arrays,
        lengths=census.lengths,
        domains=[POOLED, *census.domains],
        has=has,
        texts=texts,
        words=list(census.vocabulary.values()),
        layers=census.layers,
        heads=[census.settings["model"][name] for name in ("query_heads", "kv_heads")],
        roles=ROLES,
        statistics=[{"name": name} | asdict(STATISTICS[name]) for name in statistics(census)],
        names=list(STATISTICS),
        highs={n: {s: _high(s, n, [views[n, d] for d in has[n]]) for s in STATISTICS} for n in census.lengths},
        near={n: near_window(census, n) for n in census.lengths},
        sliding=sliding,
        limits={n: asdict(Thresholds(**census.settings["limits"]).at(n)) for n in census.lengths},
        distances={n: distances(n) for n in census.lengths},
        windows={n: windows(n) for n in census.lengths},
        model=census.settings["model"]["name"],
        columns=list(first_view.COLUMNS.items()),
        most_heads=first_view.MOST_HEADS,
    )


def _detailed(census: Census, text_maps: Mapping[int, attention.TextMaps]) -> dict[str, Any] | None:
    """The heads that are read token by token, and on which texts."""
    of = {text: one.detailed.heads for text, one in text_maps.items() if one.detailed is not None}
    names = [census.settings["texts"][text] for text in of]
    texts = [f"{text['domain']} {text['number']}" for text in names]
    return {"heads": next(iter(of.values())), "texts": texts} if of else None


def _token_data(census: Census, text: int, length: int, shown: int, maps: attention.TextMaps | None) -> str:
    """Data of the token view of one text: attention of every head to each token, secondary sinks and maps, packed."""
    arrays = {
        "attention": one_byte(census.arrays[f"{text}.{length}.attention"][..., :shown]),
        "secondary": census.arrays[f"{text}.{length}.secondary"],
    }
    more = {} if maps is None else maps.pack(arrays)
    return pack(arrays, length=length, shown=shown, **more)


def _high(statistic: str, length: int, views: list[View]) -> float:
    """Upper end of a statistic's scale at a length."""
    if statistic in ("entropy", "output", "secondary"):
        column = list(STATISTICS).index(statistic)
        return max(float(one.value[column].nan_to_num().max()) for one in views)
    high = STATISTICS[statistic].high
    return float(length) if high is None else high


def _pair_rows(pooled: View, layers: list[int]) -> list[dict[str, Any]]:
    rates, pairs = pooled.rate.tolist(), pooled.pairs.tolist()
    return [
        {"a": layers[a], "b": layers[b], "found": pairs[a][b], "base": rates[b], "lift": pairs[a][b] - rates[b]}
        for a, b in combinations(range(len(layers)), 2)
        if rates[a] > 0
    ]


def _windows(census: Census) -> list[dict[str, Any]]:
    """The windows that KV heads need at every length."""
    rows = []
    for length in census.lengths:
        row: dict[str, Any] = {"length": length, "near": near_window(census, length)}
        for kept in ("secondary", "first"):
            needed = census.required_window(length, heads="kv", kept=kept)
            row[kept] = roles.figures(needed, row["near"], length)
        rows.append(row)
    return rows


def _law(census: Census) -> dict[str, Any] | None:
    """Number of KV heads in three classes of the exponent by which windows grow with the length."""
    law = census.window_law()
    if law is None:
        return None
    exponent = law[1].flatten()
    return {
        "stays": int((exponent < 0.25).sum()),
        "between": int(((exponent >= 0.25) & (exponent <= 0.75)).sum()),
        "grows": int((exponent > 0.75).sum()),
        "median": float(exponent.median()),
        "heads": len(exponent),
    }


def _sink_logits(census: Census) -> dict[str, Any] | None:
    """Attention to learned sink logits; None for a model without them."""
    sink_logits = census.score("learned", census.lengths[-1])
    if not bool(sink_logits.max() > 0):
        return None
    layer, head = census.place(int(sink_logits.argmax()))
    return {"mean": float(sink_logits.mean()), "most": float(sink_logits.max()), "layer": layer, "head": head}


def _grid(census: Census) -> maps.Grid:
    return census.layers, census.settings["model"]["query_heads"]
