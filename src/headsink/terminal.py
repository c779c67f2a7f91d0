"""Standard output and standard error of the command line. Light: nothing here imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headsink.errors import printable

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

MEGABYTE = 1e6


def write(text: str) -> None:
    """Write a piece of a result to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def emit(result: dict[str, Any]) -> None:
    """Write the one object of `--json`."""
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write(text.encode("utf-8", "backslashreplace").decode())  # names of files need not be UTF-8


def note(message: str) -> None:
    """Write one line to standard error; what a terminal would obey is written as an escape."""
    err.print(printable(message), markup=False, highlight=False, emoji=False)


class _Table(Table):
    """A table whose cells stay on their line, whatever the names in them hold."""

    def add_row(self, *cells: str) -> None:  # type: ignore[override]
        super().add_row(*map(printable, cells))


def new_table(title: str | None, *columns: str) -> Table:
    table = _Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        table.add_column(column, header_style="dim")
    return table


@contextmanager
def resumable(*checkpoints: Path) -> Iterator[None]:
    """Say what is kept when the block is stopped, by ctrl-C or SIGTERM, and one of the checkpoints is there."""
    try:
        yield
    except KeyboardInterrupt:
        if any(path.exists() for path in checkpoints):
            note("what is done is kept: start it again to go on")
        raise
