"""`headsink bench ...`: run a measurement and write its JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from headsink.bench import census as census_bench
from headsink.files import check_file, write_text
from headsink.options import Device, Dtype, Json, Seed

bench = typer.Typer(
    help="Measure headsink on this machine, side by side with what one would use otherwise.", no_args_is_help=True
)


@bench.callback()
def _group() -> None:
    """Keep `census` a command of its own, though it is the only one."""


@bench.command(name="census")
def census(
    model: Annotated[str, typer.Argument(help="Model for the main measurement.")] = "smollm2",
    tokens: Annotated[int, typer.Option(min=16, help="Length of the text.")] = 8192,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds; the medians are to be quoted.")] = 5,
    long_tokens: Annotated[
        int, typer.Option(min=0, help="Length of the run on a model of the shape of Gemma 3 270M; 0 to leave it out.")
    ] = 32768,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the JSON here too.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time and memory of a census against a plain forward pass, and against the eager way where that still runs.

    Takes about 15 minutes on 2 cores.
    """
    if out_file is not None:
        check_file(out_file)
    result = census_bench.run(
        model, tokens=tokens, rounds=rounds, long_tokens=long_tokens, seed=seed, dtype=dtype, device=device
    )
    text = json.dumps(result, indent=1) + "\n"
    if out_file is not None:
        write_text(out_file, text)
    sys.stdout.write(text if as_json else census_bench.summary(result) + "\n")
