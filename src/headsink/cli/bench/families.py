"""`headsink bench families`: time per token of model families with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from headsink.bench.architectures import FAMILIES
from headsink.cli.bench.shared import NewTokens, OutFile, Rounds, deliver
from headsink.cli.options import Force, Json, Seed, names
from headsink.errors import HeadsinkError
from headsink.utils.files import check_file


@dataclass(frozen=True)
class FamilyOptions:
    """Options of `headsink bench families`."""

    families: Annotated[
        str, typer.Option(help=f"Which, with commas; or all: {', '.join(FAMILIES)}.", show_default=True)
    ] = "all"
    tokens: NewTokens = 33
    rounds: Rounds = 3
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32"
    out_file: OutFile = None
    seed: Seed = 0
    force: Force = False
    as_json: Json = False


def families(options: FamilyOptions) -> None:
    """Time per token of model families with random weights: transformers against the compiled step, beside the memory limit.

    Needs no model. Do nothing else on the machine. Takes about 5 minutes on 2 cores for all families.
    """
    chosen = list(FAMILIES) if options.families == "all" else names(options.families)
    if unknown := [name for name in chosen if name not in FAMILIES]:
        raise HeadsinkError(f"families: {unknown[0]!r} is not one of {', '.join(FAMILIES)}")
    if not chosen:
        raise HeadsinkError("families: none given")
    if options.dtype not in ("float32", "bfloat16"):
        raise HeadsinkError(f"dtype: {options.dtype!r} is neither float32 nor bfloat16")
    if options.out_file is not None:
        check_file(options.out_file, options.force)

    import torch

    from headsink.bench import families as family_bench

    dtype = getattr(torch, options.dtype)
    result = family_bench.run(chosen, options.tokens, options.rounds, dtype, options.seed)
    deliver(result, family_bench.table(result), options.out_file, options.force, options.as_json)
