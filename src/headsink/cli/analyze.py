"""`headsink analyze`: a census of a model's attention heads, written into a folder with a report.

Goes in: a model, and the texts and lengths to measure on. Comes out: the census folder, and its tables on the terminal
(analyze_output.py) or as one JSON object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import headsink
from headsink.census.options import CENSUS, QUERIES, TAU, check_census, check_lengths, check_tau
from headsink.cli.options import (
    MODEL_HELP,
    Force,
    RunOptions,
    Seed,
    known_model,
    memory,
    names,
    numbers,
    plan_path,
)
from headsink.cli.output import print_file
from headsink.data import corpus
from headsink.data import prompts as prompt_files
from headsink.data.domains import check_census_domains
from headsink.errors import HeadsinkError
from headsink.models.builtin import BUILT_IN, processes
from headsink.utils.files import check_replaceable
from headsink.utils.terminal import emit, out, resumable

AUTOMATIC: dict[str, Literal["auto", "none"]] = {"auto": "auto", "none": "none"}


def map_heads(value: str) -> str:
    """The value of --maps, if it can be read."""
    read_heads(value)
    return value


def read_heads(value: str) -> Literal["auto", "none"] | list[tuple[int, int]]:
    """The heads of --maps: auto, none, or (layer, query head) of each."""
    if value in AUTOMATIC:
        return AUTOMATIC[value]
    found = [re.fullmatch(r"(\d+)\.(\d+)", part.strip()) for part in value.split(",")]
    if not all(found):
        raise HeadsinkError(f"maps: {value!r} is not auto, none, or heads as in 3.2,10.4 (layer.head)")
    return [(int(one[1]), int(one[2])) for one in found if one]


@dataclass(frozen=True)
class AnalyzeOptions(RunOptions):
    """Options of `headsink analyze`."""

    model: Annotated[str | None, typer.Argument(help=f"{MODEL_HELP} smollm2 if not given.", callback=known_model)] = (
        None
    )
    out_folder: Annotated[
        Path, typer.Option("--out", help="Folder for the census; an older census there is replaced.")
    ] = Path("runs/census")
    lengths: Annotated[
        str | None,
        typer.Option(help="Text lengths in tokens, separated by commas; 512,4096, or what your own texts have."),
    ] = None
    domains: Annotated[str, typer.Option(help="Kinds of built-in text, separated by commas.")] = ",".join(
        corpus.CENSUS_DOMAINS
    )
    texts_per_domain: Annotated[
        int, typer.Option(min=1, help="Texts of each kind; intervals are over texts, so 2 or more.")
    ] = 2
    text_file: Annotated[
        list[Path] | None, typer.Option("--text", help="A text file of your own instead; may be repeated.")
    ] = None
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompts of your own instead: a file with one a line, or JSONL with {prompt: ..., domain: ...}; may be repeated."
        ),
    ] = None
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of your own instead; may be repeated.")] = None
    queries: Annotated[
        int, typer.Option(min=2, help="Queries read at each length, evenly spaced, where more would count.")
    ] = QUERIES
    tau: Annotated[
        float, typer.Option(help="Keys with a value norm below tau of the head's median can be secondary sinks.")
    ] = TAU
    maps: Annotated[
        str,
        typer.Option(
            help="Heads whose attention maps can be read token by token, as LAYER.HEAD, separated by commas; auto: those that "
            "stand out; none: no maps, which saves a forward pass over one text of each kind.",
            callback=map_heads,
        ),
    ] = "auto"
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan file: mark in the texts which tokens every head evicts under it.", callback=plan_path),
    ] = None
    rerun: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a census: make it again, with its texts and settings; other options are ignored. Name MODEL too "
            "if its model is not on this machine."
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="For a model larger than memory: most weights a device holds, as in cpu=30GB or 0=20GB,cpu=30GB."
        ),
    ] = None
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Under torchrun: split every layer over its processes.")
    ] = False
    seed: Seed = 0
    force: Force = False

    def arguments(self) -> dict[str, Any]:
        """What `headsink.analyze` takes, read and checked, but for the thresholds."""
        lengths = None if self.lengths is None else numbers("lengths", self.lengths)
        check_lengths(lengths or ())
        domains = check_census_domains(names(self.domains))
        check_tau(self.tau)
        return {
            "lengths": lengths,
            "domains": domains,
            "texts": prompt_files.read(self.text_file or [], self.prompts or [], self.prompt or []),
            "texts_per_domain": self.texts_per_domain,
            "queries": self.queries,
            "seed": self.seed,
        }

    def placement(self) -> dict[str, Any]:
        """What `headsink.load` takes that says on which devices the model goes."""
        where = {
            "device": self.device,
            "max_memory": memory(self.max_memory),
            "tensor_parallel": self.tensor_parallel,
        }
        if self.plan is not None and (self.maps == "none" or self.tensor_parallel):
            raise HeadsinkError("plan: attention maps mark it; leave out --maps none and --tensor-parallel")
        if (self.device is not None) + (self.max_memory is not None) + self.tensor_parallel > 1:
            raise HeadsinkError("device: give one of --device, --max-memory and --tensor-parallel")
        if self.tensor_parallel:
            processes()
        return where


def analyze(options: AnalyzeOptions) -> None:
    """See what every attention head looks at: sinks, local heads, retrieval heads; with a report to open in a browser.

    An interrupted run continues when it is started again with the same options.
    """
    arguments, where = options.arguments(), options.placement()
    if options.rerun is not None:
        check_census(options.rerun)
    folder = options.out_folder
    check_replaceable(folder, CENSUS, options.force)

    from headsink.census.head_statistics import Thresholds
    from headsink.census.run import analyze_again, remove_checkpoint
    from headsink.cli.analyze_output import census_json, print_census
    from headsink.models.distributed import is_main
    from headsink.report.attention import check_maps

    maps = read_heads("none" if options.tensor_parallel else options.maps)
    plan = None if options.plan is None else headsink.Plan.load(options.plan)
    checkpoint = folder.parent / f".{folder.name}.partial"
    with resumable(checkpoint):
        model, tokenizer, settings = _load(options, where)
        if not isinstance(maps, str):
            check_maps(model, maps)
        if plan is not None:
            plan.check(model)
        if settings is not None:
            census = analyze_again(model, tokenizer, settings, checkpoint=checkpoint)
        else:
            limits = Thresholds(tau=options.tau)
            census = headsink.analyze(model, tokenizer, **arguments, limits=limits, checkpoint=checkpoint)
    if not is_main():
        return
    headsink.write_report(census, folder, model=model, maps=maps, plan=plan, force=options.force)
    remove_checkpoint(checkpoint)
    if options.as_json:
        emit(census_json(census) | {"folder": str(folder)})
    else:
        print_census(out, census)
        print_file("Report", folder / "report.html")


def _load(options: AnalyzeOptions, where: dict[str, Any]) -> tuple[Any, Any, dict[str, Any] | None]:
    """The model, its tokenizer, and the settings of the census that is made again, if there is one."""
    if options.rerun is None:
        return *headsink.load(options.model or "smollm2", dtype=options.dtype, **where), None
    settings = headsink.Census.load(options.rerun).settings
    source = options.model or _source(options.rerun, settings["model"]["source"])
    return *headsink.load(source, dtype=settings["dtype"], **where), settings


def _source(folder: Path, source: str) -> str:
    """The model of a census, if it is on this machine: what a file names is not fetched from a network."""
    if source in BUILT_IN or Path(source).exists():
        return source
    raise HeadsinkError(
        f"rerun: {folder} was made with the model {source!r}, which is not on this machine; if you want that one fetched or have "
        f"it elsewhere, name it: headsink analyze MODEL --rerun {folder}"
    )
