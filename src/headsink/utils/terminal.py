"""Standard output, standard error and exit statuses of the command line. Does not import torch."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from headsink.errors import HeadsinkError, printable
from headsink.utils.files import reason

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

MEGABYTE = 1e6
PIPE_CLOSED, WRONG, INTERRUPTED = 1, 2, 130  # exit statuses


def write(text: str) -> None:
    """Write to standard output and flush. A closed one (>&-) is None and gets nothing."""
    if sys.stdout is not None:
        sys.stdout.write(text)
        sys.stdout.flush()


def emit(result: dict[str, Any]) -> None:
    """Write the JSON object of `--json`."""
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write(text.encode("utf-8", "backslashreplace").decode())  # file names need not be UTF-8


def note(message: str) -> None:
    """Write one line to standard error, with control characters escaped."""
    err.print(printable(message), markup=False, highlight=False, emoji=False)


class _Table(Table):
    """A table that escapes line breaks and control characters in its cells."""

    def add_row(self, *cells: str) -> None:  # type: ignore[override]
        super().add_row(*map(printable, cells))


def new_table(title: str | None, *columns: str) -> Table:
    table = _Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")  # wrap words that are too long, do not cut them
    return table


@contextmanager
def resumable(*checkpoints: Path) -> Iterator[None]:
    """If ctrl-C or SIGTERM stops the block and a checkpoint exists, print that the command can be resumed."""
    try:
        yield
    except KeyboardInterrupt:
        if any(path.exists() for path in checkpoints):
            note("what is done is kept: start it again to go on")
        raise


def _format_warning(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """A warning of headsink's own as one line, without the place in the code where it arose."""
    return f"headsink: {message}\n" if category is UserWarning else _with_place(message, category, *place)


_with_place = warnings.formatwarning


def run(app: typer.Typer) -> NoReturn:
    """Run a command line. Every user error becomes one line and exit status 2, every warning one line."""
    warnings.formatwarning = _format_warning  # type: ignore[assignment]
    received: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt  # SIGTERM ends a command as ctrl-C does: checkpoints stay

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        status = _run(app)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        warnings.formatwarning = _with_place
    if status == INTERRUPTED:
        note("stopped")
    sys.exit(128 + received[0] if received and status == INTERRUPTED else status)


def _run(app: typer.Typer) -> int:
    try:
        status = app(prog_name="headsink", standalone_mode=False)
        write("")
    except HeadsinkError as error:
        return _fail(str(error))
    except TyperException as error:
        message = error.format_message().rstrip(".")
        end = " See" if message.endswith("?") else "; see"
        return _fail(f"{message}{end} headsink --help") if message else WRONG
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        return _close_output(PIPE_CLOSED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return _close_output(_fail(f"cannot write {error.filename or 'standard output'}: {reason(error)}"))
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    note(f"headsink: {message}")
    return WRONG


def _close_output(status: int) -> int:
    """Redirect standard output to the null device, so that Python does not report the unwritable buffer at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    return status
