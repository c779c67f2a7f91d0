"""The command line. Every command is a thin layer over the Python interface.

A command has a module of its own: its options (a dataclass), the call, and what it prints. This module puts them together.
Results go to standard output (`--json`: one JSON object and nothing else), progress to standard error. Bad input ends with exit
status 2 and one line that says what was wrong and what would be right. For `--help` and for bad input torch is not imported.
"""

from __future__ import annotations

from typing import Annotated

import typer

from headsink.cli.ablate import ablate
from headsink.cli.analyze import analyze
from headsink.cli.bench import bench
from headsink.cli.chat import chat
from headsink.cli.command import add_command
from headsink.cli.compare import compare
from headsink.cli.doctor import doctor
from headsink.cli.generate import generate
from headsink.cli.models import models
from headsink.cli.plan import plan
from headsink.cli.prefill import prefill
from headsink.cli.serve import PASS_ON, serve
from headsink.utils.terminal import out, run

app = typer.Typer(
    name="headsink",
    help="Measure attention sinks in every head of a language model, and evict from its KV cache what the heads do not use.",
    epilog="Begin with: headsink analyze smollm2 --out runs/a, then headsink plan smollm2 --budget 0.25 --out plan.json",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
add_command(app, analyze)
add_command(app, compare)
add_command(app, ablate)
add_command(app, plan)
add_command(app, prefill)
add_command(app, generate)
add_command(app, chat)
add_command(app, serve, context_settings=PASS_ON)
add_command(app, models)
add_command(app, doctor)
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        out.print(f"headsink {version('headsink')}", highlight=False)
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Measure attention sinks in every head of a language model, and evict from its KV cache what the heads do not use."""


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
