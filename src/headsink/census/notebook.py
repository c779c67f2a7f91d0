"""A census, and one head of it, as they show themselves in a notebook: small pages without scripts.

`headsink.write_report` writes the whole report, and `headsink.attention_maps` shows the attention map of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from headsink.census.first_view import SHADES, head_view, short
from headsink.census.roles import ROLES
from headsink.census.views import STATISTICS, statistics, view
from headsink.utils import notebook
from headsink.utils.colours import ROLE_COLOURS, ramp
from headsink.utils.format import percent, visible

if TYPE_CHECKING:
    from headsink.census.results import Census

STRONGEST = 15  # heads that are listed


@dataclass(frozen=True)
class Head:
    """One query head of a census, at the longest length over all texts: its role, scores, top keys and a shaded text."""

    census: Census
    layer: int
    head: int

    def __repr__(self) -> str:
        return f"Layer {self.layer}, head {self.head} of: {self.census!r}"

    def html(self) -> str:
        """A page of its own, which needs no network and no scripts."""
        of_all = view(self.census, self.census.lengths[-1], None)
        return _page(
            "head", self.census, head_view(self.census, of_all, statistics(self.census), self.layer, self.head)
        )

    def show(self) -> None:
        """Show the head in a notebook, elsewhere in the browser."""
        notebook.show(self.html())

    def _repr_html_(self) -> str:
        return notebook.frame(self.html(), height=700)


def census_page(census: Census) -> str:
    """A page with the roles of all heads, a grid of the attention to sink tokens, and the strongest heads."""
    length = census.lengths[-1]
    rows = view(census, length, None).rows(census.layers)
    listed = sorted(rows, key=lambda row: -row["sink"])[:STRONGEST]
    counts = {role: sum(row["role"] == role for row in rows) for role in ROLES}
    return _page("census", census, {"length": length, "rows": rows, "listed": listed, "counts": counts})


def _page(name: str, census: Census, shown: dict[str, Any]) -> str:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("headsink.census", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    templates.filters |= {"short": short, "percent": percent, "visible": visible}
    titles = {name: of.title for name, of in STATISTICS.items()}
    colours = {"role_colours": ROLE_COLOURS, "ramp": ramp, "steps": SHADES}
    return templates.get_template("notebook.html.j2").render(
        page=name, model=census.settings["model"]["name"], shown=shown, titles=titles, **colours
    )
