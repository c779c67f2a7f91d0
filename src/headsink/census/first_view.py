"""The first view: the content of a census page before its script runs, for the longest length on all texts.

The page contains it as text and pictures, so it is readable without scripts and its layout does not change when they run.
census.js writes the same words into the same elements for every other view.
"""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headsink.census.head_statistics import Thresholds, distances, first_row, windows
from headsink.census.roles import ROLES
from headsink.census.views import STATISTICS, View, near_window, number, token_views, top_keys
from headsink.utils.pack import FAINTEST, STEPS, one_byte, three_figures

if TYPE_CHECKING:
    from headsink.census.results import Census


MASSES = ("sink", "first", "local", "far", "far_peak", "learned")  # statistics that are shares of the attention
ELSEWHERE = ("distance", "window", "window_first", "agreement")  # shown in the line above the table
MOST_KEYS = 10
MOST_HEADS = 20  # rows of the table of all heads
COLUMNS = {  # of the table of all heads
    "sink": "sinks",
    "first": "first token",
    "local": "last keys",
    "far": "far",
    "far_peak": "strongest far key",
    "entropy": "entropy, nats",
    "distance": "median distance",
    "window": "window needed",
    "error_secondary": "error of near window",
    "output": "output norm",
}
AROUND = 5  # tokens of context on either side of a top key
SHADES = 10  # steps of the token view: twice flat attention, four times, ... 1024 times
LEAST_ERROR = 1e-6  # lower end of a logarithmic axis


def flat_keys(length: int, sliding: int | None) -> Tensor:
    """Flat attention to each key, mean over the included queries: float64 [length]."""
    visible = _visible_keys(length, sliding)
    share = torch.where(torch.arange(length) < first_row(length), 0, 1 / visible)
    sums = torch.nn.functional.pad(share.cumsum(0), (1, 0))
    last = (torch.arange(length) + (sliding or length)).clamp(max=length)
    return (sums[last] - sums[:-1]) / (length - first_row(length))


def flat_profile(length: int, sliding: int | None) -> Tensor:
    """Flat attention within each distance: float64 [distances]."""
    visible = _visible_keys(length, sliding)[first_row(length) :]
    return (torch.tensor(distances(length)).double()[:, None].minimum(visible) / visible).mean(1)


def _visible_keys(length: int, sliding: int | None) -> Tensor:
    """Number of keys that each query sees: float64 [length]."""
    return torch.arange(1, length + 1).double().clamp(max=sliding or length)


def first_view(census: Census, views: dict[int, View], names: list[str]) -> dict[str, Any]:
    """Everything that the page shows about the head with most attention to sinks other than the first token.

    views: of all texts, by length. names: of the statistics that the page shows.
    """
    view = views[census.lengths[-1]]
    rows = view.rows(census.layers)
    row = max(rows, key=lambda row: row["sink"] - row["first"])
    roles = [row["role"] for row in rows]
    shown = replace(view, value=three_figures(view.value))  # as the page's script reads it
    sinks = sorted(shown.rows(census.layers), key=lambda row: -row["sink"])[:MOST_HEADS]
    whole = {"counts": {role: roles.count(role) for role in ROLES}, "every": sinks}
    return head_view(census, view, names, row["layer"], row["head"]) | whole


def head_view(census: Census, view: View, names: list[str], layer: int, head: int) -> dict[str, Any]:
    """What is said about one head at the longest length, over all texts. names: of the statistics that are shown."""
    length, texts, at = census.lengths[-1], len(census.texts(census.lengths[-1])), (census.layers.index(layer), head)
    row = next(row for row in view.rows(census.layers) if (row["layer"], row["head"]) == (layer, head))
    near = near_window(census, length)
    return {
        "length": length,
        "layer": layer,
        "head": head,
        "kv": head // census.group,
        "row": row,
        "texts": texts,
        "same": round(row["agreement"] * texts),
        "near": near,
        "scores": _scores(view, at, names, near),
        "keys": _keys(census, length, at),
        "text": _text(census, at),
    }


def head_charts(census: Census, views: dict[int, View], layer: int, head: int) -> dict[str, list[dict[str, Any]]]:
    """Data of the charts of one head, see `maps.profile` and `maps.window_errors`."""
    profile, errors, last, row = [], [], census.lengths[-1], census.layers.index(layer)
    for length, view in views.items():
        lines = {"this head": view.profile[row, head]}
        if length == last:
            lines["flat attention"] = flat_profile(length, census.settings["model"]["sliding"][row])
        for line, within in lines.items():
            profile += [
                {"distance": distance, "within": share, "line": line, "length": length, "chosen": length == last}
                for distance, share in zip(distances(length), within.tolist(), strict=True)
            ]
        for kept, error in zip(
            ("initial tokens", "with secondary sinks"), view.errors[row, head].tolist(), strict=True
        ):
            errors += [
                {"window": window, "error": max(one, LEAST_ERROR), "kept": kept, "length": length}
                | {"chosen": length == last}
                for window, one in zip(windows(length), error, strict=True)
            ]
    return {"profile": profile, "errors": errors}


def short(value: float | None, digits: int = 3) -> str:
    """A number with three significant digits, in the format of `figures` in common.js."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{math.floor(value + 0.5):,}"
    rounded = Context(prec=digits, rounding=ROUND_HALF_UP).create_decimal(value).normalize()
    if 0 < abs(rounded) < Decimal("1e-6"):
        return f"{rounded:e}"
    return f"{rounded:f}"


Place = tuple[int, int]  # row of the layer and head, in the tensors of a census


def _scores(view: View, at: Place, statistics: list[str], near: int) -> list[dict[str, Any]]:
    """Rows of the table of scores."""
    lines = []
    for name in statistics:
        if name in ELSEWHERE:
            continue
        n = list(STATISTICS).index(name)
        numbers = (number(three_figures(of[n, *at])) for of in (view.value, view.half, view.uniform))
        title = STATISTICS[name].title.replace("the near window", f"a window of {near}")
        title = title.removeprefix("attention to ").removeprefix("the ")
        lines.append({"name": name, "title": title, "share": name in MASSES, "numbers": list(numbers)})
    return lines


def _keys(census: Census, length: int, at: Place) -> list[dict[str, Any]]:
    """Rows of the table of top keys."""
    flat = three_figures(flat_keys(length, census.settings["model"]["sliding"][at[0]]))
    first, lines = Thresholds(**census.settings["limits"]).at(length).first, []
    for text in census.texts(length):
        top = {name: array[at] for name, array in top_keys(census, text, length).items()}
        words, name = _words(census, text, length), census.settings["texts"][text]
        received = three_figures(top["drawn"]).tolist()
        for position, attention, sink in zip(top["top"].tolist(), received, top["sink"].tolist(), strict=True):
            if position >= 0:
                lines.append(
                    {
                        "before": "".join(words[max(0, position - AROUND) : position]),
                        "word": words[position],
                        "after": "".join(words[position + 1 : position + 1 + AROUND]),
                        "text": f"{name['domain']} {name['number']}",
                        "position": position,
                        "attention": attention,
                        "times": attention / float(flat[position]),
                        "mark": "secondary-sink" if sink else "first-token" if position < first else "",
                    }
                )
    return sorted(lines, key=lambda line: -line["attention"])[:MOST_KEYS]


def _text(census: Census, at: Place) -> dict[str, Any]:
    """The first text, with the word, the colour step and the kind of sink of each token."""
    text, (length, shown) = next(iter(token_views(census).items()))
    shade = one_byte(census.arrays[f"{text}.{length}.attention"][at][:shown]).double()
    attention = torch.where(shade > 0, FAINTEST ** (1 - (shade - 1) / STEPS), 0)
    flat = three_figures(flat_keys(length, census.settings["model"]["sliding"][at[0]])[:shown])
    times = torch.where(flat > 0, attention / flat, 0)
    steps = times.log2().round().clamp(0, SHADES).int().tolist()
    secondary = set(census.arrays[f"{text}.{length}.secondary"][at[0], at[1] // census.group].tolist())
    first = Thresholds(**census.settings["limits"]).at(length).first
    marks = ["secondary-sink" if n in secondary else "first-token" if n < first else "" for n in range(shown)]
    return {
        "number": text,
        "length": length,
        "shown": shown,
        "tokens": list(zip(_words(census, text, shown), steps, marks, strict=True)),
    }


def _words(census: Census, text: int, length: int) -> list[str]:
    return [census.vocabulary[token] for token in census.arrays[f"{text}.ids"][:length].tolist()]
