"""Write the report of a comparison as one HTML file and pictures: changes of heads from the first run to the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headsink.census.roles import ROLES
from headsink.census.views import STATISTICS
from headsink.report import charts, maps
from headsink.report.assets import environment, write_picture
from headsink.report.page import draw
from headsink.utils.files import write_text
from headsink.utils.format import capital
from headsink.utils.pack import pack

if TYPE_CHECKING:
    from headsink.census.compare import Comparison, View


SETTING_LENGTH = 200  # characters of a setting that are shown


def write_comparison(comparison: Comparison, path: Path, *, force: bool = False) -> None:
    """Write one HTML file. Text that comes from models, prompts or names of runs is escaped."""
    first = _first_view(comparison)
    layer, head = first.to_dict()["largest_at"]
    spec = charts.spec(maps.change_map(_grid(comparison), _high(comparison, first.score)))
    text = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            names=comparison.names,
            differing=_differences(comparison),
            heads=comparison.heads,
            changed=len(comparison.changed),
            grid=_grid(comparison),
            specs={"map": spec},
            box=draw("map", charts.fill(spec, heads=_rows(first), selected=[{"layer": layer, "head": head}])),
            data=_data(comparison),
        )
    )
    write_text(path, text, force)


def write_comparison_pictures(comparison: Comparison, folder: Path) -> None:
    """Write the maps for all texts (or the first kind of text) as `figure-change-<score>-<length>.png` and `.svg`."""
    runs = list(comparison.names[1:])
    for view in comparison.views:
        if view.domains != comparison.views[0].domains:
            continue
        high = _high(comparison, view.score)
        spec = charts.spec(
            maps.change_map(_grid(comparison), high), [_title(view.score), f"{comparison.names[0]} → {view.run}"]
        )
        number = f"-{runs.index(view.run) + 2}" if len(runs) > 1 else ""
        name = f"figure-change-{view.score}-{view.lengths[1]}{number}"
        write_picture(folder / name, charts.fill(spec, heads=_rows(view), selected=[]))


def _data(comparison: Comparison) -> str:
    arrays: dict[str, Tensor] = {}
    for n, view in enumerate(comparison.views):
        parts = {"before": view.before, "after": view.after, "change": view.change.mean, "half": view.change.half}
        arrays |= {f"{n}.{name}": array for name, array in parts.items()}
    scores = dict.fromkeys(view.score for view in comparison.views)
    return pack(
        arrays,
        names=comparison.names,
        grid=_grid(comparison),
        roles=ROLES,
        scores=[{"name": name, "title": _title(name), "high": _high(comparison, name)} for name in scores],
        views=[view.to_dict() for view in comparison.views],
        changed=comparison.changed,
    )


def _first_view(comparison: Comparison) -> View:
    """The view that the page shows first: the last length of the first run."""
    start = comparison.views[0]
    views = [view for view in comparison.views if (view.run, view.score) == (start.run, start.score)]
    last = list(dict.fromkeys(view.lengths for view in views))[-1]
    return next(view for view in views if view.lengths == last)


def _rows(view: View) -> list[dict[str, Any]]:
    """A row for each head, for `maps.change_map`."""
    columns = {"before": view.before, "after": view.after, "value": view.change.mean, "half": view.change.half}
    rows = charts.each(columns, view.layers)
    return [row | {"beyond": row["half"] is not None and abs(row["value"]) > row["half"]} for row in rows]


def _high(comparison: Comparison, score: str) -> float:
    """Upper end of a score's scale: its largest change in all views, so that views can be compared."""
    return max(1e-6, *(float(view.change.mean.abs().max()) for view in comparison.views if view.score == score))


def _differences(comparison: Comparison) -> dict[str, list[str]]:
    """The settings that differ between the runs, as shortened text: setting -> value of each run."""
    differing: dict[str, list[str]] = {}
    for key, values in comparison.settings.items():
        if key == "texts":
            differing[key] = [
                ", ".join(f"{t['domain']} {t['number']} ({t['tokens']})" for t in texts) for texts in values
            ]
        elif isinstance(values[0], dict):
            for part in dict.fromkeys(part for value in values for part in value):
                parts = [value.get(part) for value in values]
                if any(one != parts[0] for one in parts):
                    differing[f"{key}: {part}"] = [_setting_text(one) for one in parts]
        else:
            differing[key] = [_setting_text(value) for value in values]
    return {
        key: [value if len(value) <= SETTING_LENGTH else value[:SETTING_LENGTH] + " …" for value in values]
        for key, values in differing.items()
    }


def _setting_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _title(score: str) -> str:
    return capital(STATISTICS[score].title)


def _grid(comparison: Comparison) -> maps.Grid:
    return comparison.views[0].layers, comparison.views[0].before.shape[1]
