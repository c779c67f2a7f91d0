"""`headsink bench ...`: run a measurement and write its JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from headsink.bench import census as census_bench
from headsink.bench import speed as speed_bench
from headsink.files import check_file, write_text
from headsink.options import Device, Dtype, Json, Seed, numbers
from headsink.plan import Plan
from headsink.progress import console

bench = typer.Typer(
    help="Measure headsink on this machine, side by side with what one would use otherwise.", no_args_is_help=True
)


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


@bench.command(name="speed")
def speed(
    model: Annotated[str, typer.Argument(help="Model to measure.")] = "smollm2",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan to measure beside the all-full one.")] = None,
    contexts: Annotated[str, typer.Option(help="Tokens of the prompts, with commas.")] = "512,2000,7500",
    tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate after a prompt.")] = 33,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds; the medians are to be quoted.")] = 5,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the JSON here too.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time to the first token, time per token and bytes of the KV cache, under a plan, against transformers.

    Do nothing else on the machine. Takes about 15 minutes on 2 cores.
    """
    if out_file is not None:
        check_file(out_file)
    lengths = numbers("contexts", contexts)
    result = speed_bench.run(
        model,
        contexts=lengths,
        tokens=tokens,
        rounds=rounds,
        plan=Plan.load(plan_file) if plan_file else None,
        seed=seed,
        dtype=dtype,
        device=device,
        report=lambda line: console.print(line, highlight=False),
    )
    text = json.dumps(result, indent=1) + "\n"
    if out_file is not None:
        write_text(out_file, text)
    sys.stdout.write(text if as_json else "\n".join(speed_bench.table(result, n) for n in lengths) + "\n")
