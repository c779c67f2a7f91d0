"""`headsink bench census`: what a census costs in time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from headsink.cli.bench.shared import OutFile, Rounds, deliver
from headsink.cli.options import Device, Dtype, Force, Json, Model, Seed
from headsink.utils.files import check_file


@dataclass(frozen=True)
class CensusOptions:
    """Options of `headsink bench census`."""

    model: Model = "smollm2"
    tokens: Annotated[int, typer.Option(min=16, help="Length of the text.")] = 8192
    rounds: Rounds = 5
    long_tokens: Annotated[
        int, typer.Option(min=0, help="Length of the run on a model of the shape of Gemma 3 270M; 0 to leave it out.")
    ] = 32768
    out_file: OutFile = None
    seed: Seed = 0
    dtype: Dtype = None
    device: Device = None
    force: Force = False
    as_json: Json = False


def census(options: CensusOptions) -> None:
    """Time and memory of a census against a plain forward pass, and against the eager computation where that still runs.

    Takes about 15 minutes on 2 cores.
    """
    if options.out_file is not None:
        check_file(options.out_file, options.force)

    from headsink.bench import census as census_bench

    result = census_bench.run(
        options.model,
        tokens=options.tokens,
        rounds=options.rounds,
        long_tokens=options.long_tokens,
        seed=options.seed,
        dtype=options.dtype,
        device=options.device,
    )
    deliver(result, census_bench.summary(result), options.out_file, options.force, options.as_json)
