"""Style sheets, scripts and templates of the HTML pages, and charts as pictures."""

from __future__ import annotations

import os
import struct
import zlib
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import jinja2
import vl_convert
from markupsafe import Markup

from headsink.census import first_view
from headsink.report import charts
from headsink.utils.colours import ROLE_COLOURS, ramp
from headsink.utils.files import new_file
from headsink.utils.format import capital, figures, p_value, percent, ranges, share, visible

PIXELS = 3.0  # of a picture per CSS pixel: 300 dpi at its size on the page
PNG_HEADER = 8 + 25  # bytes of the signature and of the first chunk


def to_svg(spec: dict[str, Any]) -> str:
    return str(vl_convert.vegalite_to_svg(charts.drawable(spec)))


def write_picture(path: Path, spec: dict[str, Any]) -> None:
    """Write a chart with its data as `path`.svg and `path`.png."""
    svg = to_svg(spec)
    path.with_name(f"{path.name}.svg").write_text(svg, encoding="utf-8")
    path.with_name(f"{path.name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=PIXELS))


def save_picture(path: str | os.PathLike[str], spec: dict[str, Any], force: bool = False) -> Path:
    """Write a chart with its data as one file, .svg or .png, atomically. It says that headsink made it (utils/files.py)."""
    svg = to_svg(spec).replace("<svg ", '<svg data-generator="headsink" ', 1)
    with new_file(path, force) as part:
        if Path(path).suffix.lower() == ".svg":
            part.write_text(svg, encoding="utf-8")
        else:
            png, text = vl_convert.svg_to_png(svg, scale=PIXELS), b"tEXtSoftware\0headsink"
            chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
            part.write_bytes(png[:PNG_HEADER] + chunk + png[PNG_HEADER:])
    return Path(path)


def environment() -> jinja2.Environment:
    """The template environment. Escapes all text except the package's own scripts and style sheets."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("headsink.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "share": share,
        "p": p_value,
        "figures": figures,
        "visible": visible,
        "short": first_view.short,
        "percent": percent,
        "ranges": ranges,
        "capital": capital,
    }
    templates.globals |= {"asset": asset, "scripts": scripts, "role_colours": ROLE_COLOURS}
    templates.globals["ramp"] = partial(ramp, first_view.SHADES)
    return templates


def asset(name: str) -> Markup:
    """Contents of a script or style sheet of the package."""
    return Markup((files("headsink.report") / name).read_text(encoding="utf-8"))


@cache
def scripts() -> Markup:
    """The JavaScript of Vega, Vega-Lite and Vega-Embed."""
    return Markup(cast(Any, vl_convert).javascript_bundle())
