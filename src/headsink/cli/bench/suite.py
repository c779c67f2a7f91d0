"""`headsink bench all`, `rerun` and `results`: the rows that docs/results.md shows, in one folder.

`all` measures the rows that are missing, `rerun` measures one once more and compares, `results` writes the page from them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from headsink.bench.options import Options, check_contexts, check_families, model_names
from headsink.bench.tasks.suites import find_suite
from headsink.bench.tasks.tasks import task as find_task
from headsink.cli.bench.shared import Batches, LlamaCpp, NewTokens, Rounds, Vllm, join_values
from headsink.cli.options import Device, Force, Json, RunOptions, Seed, batch_sizes, names, numbers
from headsink.errors import HeadsinkError
from headsink.evaluation.options import check_budget
from headsink.utils.files import check_file
from headsink.utils.terminal import resumable, write

DEFAULT = Options()
BATCHES = join_values(DEFAULT.batches)
Folder = Annotated[Path, typer.Argument(help="Folder that headsink bench all filled.")]


@dataclass(frozen=True)
class AllOptions(RunOptions):
    """Options of `headsink bench all`."""

    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the rows and plans; what is there is kept.")]
    models: Annotated[str, typer.Option(help="Models, with commas.")] = join_values(DEFAULT.models)
    only: Annotated[
        list[str] | None,
        typer.Option(help="Rows to measure, as patterns: 'speed/*', '*/smollm2/gsm8k'; may be repeated."),
    ] = None
    tasks: Annotated[str, typer.Option(help="Tasks of the quality rows, with commas.")] = join_values(DEFAULT.tasks)
    suites: Annotated[str, typer.Option(help="Long-context suites, with commas.")] = join_values(DEFAULT.suites)
    items: Annotated[int, typer.Option(min=1, help="Items of a task.")] = DEFAULT.items
    context: Annotated[int, typer.Option(help="Tokens of context of plans, tasks, suites and domains.")] = (
        DEFAULT.context
    )
    budgets: Annotated[str, typer.Option(help="Budgets of the plans, with commas.")] = join_values(DEFAULT.budgets)
    families: Annotated[str, typer.Option("--domains", help="Domains to compare, separated by commas.")] = join_values(
        DEFAULT.families
    )
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents of each family.")] = DEFAULT.documents
    contexts: Annotated[str, typer.Option(help="Tokens of the prompts, with commas.")] = join_values(DEFAULT.contexts)
    batches: Batches = BATCHES
    tokens: NewTokens = DEFAULT.tokens
    rounds: Rounds = DEFAULT.rounds
    llama_cpp: LlamaCpp = None
    vllm: Vllm = None
    list_only: Annotated[
        bool, typer.Option("--list", help="Measure nothing: say which rows there are, and their state.")
    ] = False
    seed: Seed = 0

    def measured(self) -> Options:
        """What is measured, read and checked."""
        options = Options(
            models=model_names(names(self.models)),
            tasks=tuple(names(self.tasks)),
            suites=tuple(names(self.suites)),
            items=self.items,
            context=self.context,
            budgets=tuple(numbers("budgets", self.budgets, float)),
            families=tuple(names(self.families)),
            documents=self.documents,
            contexts=tuple(numbers("contexts", self.contexts)),
            batches=tuple(batch_sizes(self.batches)),
            tokens=self.tokens,
            rounds=self.rounds,
            seed=self.seed,
            dtype=self.dtype,
            device=self.device,
            llama_cpp=self.llama_cpp,
            vllm=self.vllm,
        )
        _check(options)
        return options


def _check(options: Options) -> None:
    """Raise for what no row can be measured with."""
    for name in options.tasks:
        find_task(name)
    for suite in options.suites:
        find_suite(suite)
    for budget in options.budgets:
        check_budget(budget)
    check_families(options.families, options.documents, options.texts, options.budget)
    check_contexts(options.contexts, options.tokens)


def everything(options: AllOptions) -> None:
    """Measure all that docs/results.md shows, row by row, into a folder. Takes hours; an interrupted run continues.

    Rows that are there with the same settings are kept. What a missing package keeps from being measured is recorded so.
    """
    measured = options.measured()

    from headsink.bench.suite import run as all_bench

    with resumable(options.out_folder):
        act = all_bench.states if options.list_only else all_bench.run
        done = act(measured, options.out_folder, options.only or ())
    if options.as_json:
        write(json.dumps(done, indent=1) + "\n")
    else:
        write("".join(f"{name:<40} {state}\n" for name, state in done.items()))


@dataclass(frozen=True)
class RerunOptions:
    """Options of `headsink bench rerun`."""

    folder: Folder
    row: Annotated[str, typer.Argument(help="Name of the row, such as quality/smollm2/gsm8k.")]
    models: Annotated[str, typer.Option(help="Where models are that are not built in, with commas.")] = join_values(
        DEFAULT.models
    )
    llama_cpp: LlamaCpp = None
    vllm: Vllm = None
    device: Device = None
    as_json: Json = False

    def measured(self) -> Options:
        """What the row is measured with in addition to its own settings."""
        models = model_names(names(self.models))
        return Options(models=models, llama_cpp=self.llama_cpp, vllm=self.vllm, device=self.device)


def rerun(options: RerunOptions) -> None:
    """Measure a row again and compare every figure with the one that is there. The folder stays as it is.

    Ends with exit status 1 if a figure lies outside the interval or range that was committed, or has changed where it should not.
    """
    _check_filled(options.folder)
    measured = options.measured()

    from headsink.bench.suite import run as all_bench

    found = all_bench.again(measured, options.folder, options.row)
    if options.as_json:
        write(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    else:
        write("".join(f"{one.figure:<60} {one.before} -> {one.now}: {one.verdict}\n" for one in found))
    if any(one.verdict in ("outside", "changed") for one in found):
        raise typer.Exit(1)


@dataclass(frozen=True)
class ResultsOptions:
    """Options of `headsink bench results`."""

    folders: Annotated[
        list[Path], typer.Argument(help="Folder that headsink bench all filled; several to join machines.")
    ]
    out_file: Annotated[
        Path, typer.Option("--out", help="The page (Markdown); pictures go into pictures/ next to it.")
    ] = Path("docs/results.md")
    force: Force = False


def results(options: ResultsOptions) -> None:
    """Write the page of results from the rows of a folder, and from nothing else.

    Several folders, of several machines or settings, become one table of ratios; where they disagree it shows the range.
    """
    check_file(options.out_file, options.force)
    for folder in options.folders:
        _check_filled(folder)

    from headsink.bench.suite import joined, page

    if len(options.folders) == 1:
        page.write(options.folders[0], options.out_file, options.force)
    else:
        joined.write(options.folders, options.out_file, options.force)
    write(f"{options.out_file}\n")


def _check_filled(folder: Path) -> None:
    if not folder.is_dir():
        raise HeadsinkError(f"{folder}: no such folder; name one that headsink bench all has filled")
