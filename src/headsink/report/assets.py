"""Files of the page (styles, scripts) and charts as pictures."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2
import vl_convert
from markupsafe import Markup

from headsink.report import charts, first_view
from headsink.utils.format import capital, figures, p_value, percent, share, visible

if TYPE_CHECKING:
    pass


PIXELS = 3.0  # of a picture, per CSS pixel: 300 dpi at the size that it has on the page


def to_svg(found: dict[str, Any]) -> str:
    return str(vl_convert.vegalite_to_svg(charts.drawable(found)))


def write_picture(path: Path, spec: dict[str, Any]) -> None:
    """Write a chart that has its data as `path`.svg and `path`.png."""
    svg = to_svg(spec)
    path.with_name(f"{path.name}.svg").write_text(svg, encoding="utf-8")
    path.with_name(f"{path.name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=PIXELS))


def environment() -> jinja2.Environment:
    """Templates with everything escaped but what is the package's own."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("headsink.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "share": share,
        "p": p_value,
        "figures": figures,
        "visible": visible,
        "short": first_view.short,
        "percent": percent,
        "capital": capital,
    }
    found.globals |= {"asset": asset, "scripts": scripts, "role_colours": charts.ROLE_COLOURS}
    return found


def asset(name: str) -> Markup:
    """A script or style sheet of the package."""
    return Markup((files("headsink.report") / name).read_text(encoding="utf-8"))


@cache
def scripts() -> Markup:
    """Vega, Vega-Lite and Vega-Embed."""
    return Markup(cast(Any, vl_convert).javascript_bundle())
