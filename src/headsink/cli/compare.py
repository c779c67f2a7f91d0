"""`headsink compare`: what differs between census runs, as a table, an HTML report, or maps as pictures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import headsink
from headsink.census.options import check_census, run_parts
from headsink.cli.options import Force, Json
from headsink.cli.output import print_file
from headsink.errors import printable
from headsink.utils.files import check_file, check_replaceable, new_folder
from headsink.utils.terminal import emit, new_table, out

if TYPE_CHECKING:
    from headsink import Comparison

COMPARISON = "comparison.json"  # marks a folder of figures as one of ours
SHOWN = ("sink", "first", "far")  # scores of a comparison that go on the screen; `--json` has all


@dataclass(frozen=True)
class CompareOptions:
    """Options of `headsink compare`."""

    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of two or more census runs; FOLDER@512 and FOLDER@512:code name a part."),
    ]
    report_file: Annotated[Path | None, typer.Option("--out", help="Write the comparison as an HTML report too.")] = (
        None
    )
    figures: Annotated[
        Path | None, typer.Option(help="Folder for its maps as PNG and SVG; older ones there are replaced.")
    ] = None
    force: Force = False
    as_json: Json = False

    def __post_init__(self) -> None:
        if self.report_file is not None:
            check_file(self.report_file, self.force)
        if self.figures is not None:
            check_replaceable(self.figures, COMPARISON, self.force)
        for one in self.runs:
            check_census(Path(run_parts(str(one))[0]))


def compare(options: CompareOptions) -> None:
    """Compare census runs with the first: how far heads moved, what of it is more than chance, which changed their role.

    Two lengths or two domains of one run: headsink compare runs/a@512 runs/a@4096
    """
    from headsink.report.comparison import write_comparison, write_comparison_pictures

    comparison, report_file = headsink.compare(*options.runs), options.report_file
    if report_file is not None:
        write_comparison(comparison, report_file, force=options.force)
    if options.figures is not None:
        with new_folder(options.figures, COMPARISON, options.force) as part:
            write_comparison_pictures(comparison, part)
            (part / COMPARISON).write_text(json.dumps(comparison.to_dict(), indent=1), encoding="utf-8")
    if options.as_json:
        emit(comparison.to_dict() | {"report": None if report_file is None else str(report_file)})
    else:
        print_comparison(out, comparison)
        if report_file is not None:
            print_file("Report", report_file)


def print_comparison(console: Console, found: Comparison) -> None:
    """The runs, in which settings they differ, a table of scores, and which heads have another role."""
    console.print(" and ".join(f"[bold]{escape(printable(name))}[/bold]" for name in found.names))
    if found.settings:
        console.print("They differ in: " + ", ".join(found.settings))
    else:
        console.print("They were made with the same settings.")
    console.print(_scores(found))
    if any(view.domains == (None, None) for view in found.views):
        console.print("By domain: --json, or the report of --out.", style="dim", highlight=False)
    console.print(
        f"{len(found.changed)} of {found.heads} (run, length, text, head) have another role:", highlight=False
    )
    moves = Counter(f"{row['before']} to {row['after']}" for row in found.changed).most_common()
    console.print("  " + (", ".join(f"{move} {n}" for move, n in moves) or "none"), highlight=False)


def _scores(found: Comparison) -> Table:
    """A row for each run, length and score; over all domains, where there are several."""
    columns = (
        "run",
        "tokens",
        "text",
        "score",
        "first",
        "this",
        "change",
        "most",
        "at head",
        "rank corr.",
        "beyond chance",
    )
    table = new_table(
        "Scores: means over the heads, their mean and largest change, rank correlation of the heads, share of heads whose 95 % "
        "interval of the change leaves out 0",
        *columns,
    )
    pooled = [view for view in found.views if view.domains == (None, None)]
    for view in pooled or found.views:
        if view.score not in SHOWN:
            continue
        row = view.to_dict()
        rho, beyond = row["rank_correlation"], row["beyond_chance"]
        figures = (f"{row[name]:.3f}" for name in ("mean_a", "mean_b", "mean_difference", "largest_difference"))
        place = "{}.{}".format(*row["largest_at"])
        lengths, domains = (" / ".join(dict.fromkeys(map(str, row[name]))) for name in ("lengths", "domains"))
        cells = (place, "-" if rho is None else f"{rho:.3f}", "-" if beyond is None else f"{beyond:.0%}")
        table.add_row(escape(Path(view.run).name), lengths, escape(domains), view.score, *figures, *cells)
    return table
