"""`headsink bench ...`: run a measurement and write its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headsink.bench.options import CONTEXTS, NODE_PACKAGE, Options, check_contexts, check_families, model_names
from headsink.bench.tasks.tasks import task as find_task
from headsink.cli.bench_domains import families
from headsink.cli.bench_quality import quality
from headsink.cli.options import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    OtherWeights,
    PlanFiles,
    Seed,
    batch_sizes,
    names,
    numbers,
)
from headsink.errors import HeadsinkError
from headsink.evaluation.options import check_budget
from headsink.utils.files import check_file, write_text
from headsink.utils.progress import console
from headsink.utils.terminal import resumable, write

if TYPE_CHECKING:
    from headsink.plan.plan import Plan


bench = typer.Typer(
    help="Measure headsink on this machine, side by side with what one would use otherwise.", no_args_is_help=True
)
bench.command()(families)
bench.command()(quality)
DEFAULT = Options()


def _listed(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))


ALL_CONTEXTS, ALL_BATCHES = _listed(DEFAULT.contexts), _listed(DEFAULT.batches)
Contexts = Annotated[str, typer.Option(help="Tokens of the prompts, with commas.")]
FittedContexts = Annotated[
    str | None,
    typer.Option(help=f"Tokens of the prompts, with commas; of {_listed(CONTEXTS)} what the model has room for."),
]
Batches = Annotated[str, typer.Option(help="How many texts at once, with commas.")]
Rounds = Annotated[int, typer.Option(min=1, help="Alternating rounds; the medians are to be quoted.")]
OutFile = Annotated[Path | None, typer.Option("--out", help="Write the JSON here too.")]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(help=f"Measure llama.cpp too: a folder with node-llama-cpp in its node_modules ({NODE_PACKAGE})."),
]
Vllm = Annotated[
    Path | None,
    typer.Option(help="Measure vLLM too: the Python of an environment that has it; the one that runs this, if it has."),
]


@bench.command(name="census")
def census(
    model: Model = "smollm2",
    tokens: Annotated[int, typer.Option(min=16, help="Length of the text.")] = 8192,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds; the medians are to be quoted.")] = 5,
    long_tokens: Annotated[
        int, typer.Option(min=0, help="Length of the run on a model of the shape of Gemma 3 270M; 0 to leave it out.")
    ] = 32768,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the JSON here too.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time and memory of a census against a plain forward pass, and against the eager way where that still runs.

    Takes about 15 minutes on 2 cores.
    """
    if out_file is not None:
        check_file(out_file, force)

    from headsink.bench import census as census_bench

    result = census_bench.run(
        model, tokens=tokens, rounds=rounds, long_tokens=long_tokens, seed=seed, dtype=dtype, device=device
    )
    text = json.dumps(result, indent=1) + "\n"
    if out_file is not None:
        write_text(out_file, text, force)
    write(text if as_json else census_bench.summary(result) + "\n")


@bench.command(name="speed")
def speed(
    model: Model = "smollm2",
    plan_files: PlanFiles = None,
    contexts: FittedContexts = None,
    batches: Batches = "1",
    tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate after a prompt.")] = 33,
    rounds: Rounds = 5,
    llama_cpp: LlamaCpp = None,
    vllm: Vllm = None,
    other_weights: OtherWeights = False,
    out_file: OutFile = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time to the first token, time per token and bytes of the KV cache, under plans, against transformers and peers.

    Do nothing else on the machine. Takes about 15 minutes on 2 cores for one plan and one text at a time.
    """
    if out_file is not None:
        check_file(out_file, force)
    lengths, texts = None if contexts is None else numbers("contexts", contexts), batch_sizes(batches)
    check_contexts(lengths or (), tokens)

    from headsink.bench import speed as speed_bench

    result = speed_bench.run(
        model,
        contexts=lengths,
        batches=texts,
        tokens=tokens,
        rounds=rounds,
        plans=named_plans(plan_files or []),
        other_weights=other_weights,
        llama_cpp=llama_cpp,
        vllm=vllm,
        seed=seed,
        dtype=dtype,
        device=device,
        report=lambda line: console.print(line, highlight=False),
    )
    shown = dict.fromkeys((row["context"], row["batch"]) for row in result["results"])
    tables = [speed_bench.table(result, *one) for one in shown]
    _tell(result, tables, out_file, force, as_json)


@bench.command(name="memory")
def memory(
    model: Model = "smollm2",
    plan_files: PlanFiles = None,
    contexts: FittedContexts = None,
    batches: Batches = "1",
    rounds: Rounds = 2,
    llama_cpp: LlamaCpp = None,
    vllm: Vllm = None,
    other_weights: OtherWeights = False,
    out_file: OutFile = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Bytes of the KV cache and peak memory of a process, under plans, against transformers and peers.

    Takes about 10 minutes on 2 cores for one plan and one text at a time.
    """
    if out_file is not None:
        check_file(out_file, force)
    lengths, texts = None if contexts is None else numbers("contexts", contexts), batch_sizes(batches)
    check_contexts(lengths or (), 0)

    from headsink.bench import memory as memory_bench

    result = memory_bench.run(
        model,
        contexts=lengths,
        batches=texts,
        rounds=rounds,
        plans=named_plans(plan_files or []),
        other_weights=other_weights,
        llama_cpp=llama_cpp,
        vllm=vllm,
        seed=seed,
        dtype=dtype,
        device=device,
        report=lambda line: console.print(line, highlight=False),
    )
    shown = dict.fromkeys((row["context"], row["batch"]) for row in result["results"])
    tables = [memory_bench.table(result, *one) for one in shown]
    _tell(result, tables, out_file, force, as_json)


@bench.command(name="all")
def everything(
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the rows and plans; what is there is kept.")],
    models: Annotated[str, typer.Option(help="Models, with commas.")] = _listed(DEFAULT.models),
    only: Annotated[
        list[str] | None,
        typer.Option(help="Rows to measure, as patterns: 'speed/*', '*/smollm2/gsm8k'; may be repeated."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of the quality rows, with commas.")] = _listed(DEFAULT.tasks),
    items: Annotated[int, typer.Option(min=1, help="Items of a task.")] = DEFAULT.items,
    context: Annotated[int, typer.Option(help="Tokens of context of plans, tasks and families.")] = DEFAULT.context,
    budgets: Annotated[str, typer.Option(help="Budgets of the plans, with commas.")] = _listed(DEFAULT.budgets),
    families: Annotated[str, typer.Option(help="Kinds of text of the rows of families, with commas.")] = _listed(
        DEFAULT.families
    ),
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents of each family.")] = DEFAULT.documents,
    contexts: Contexts = ALL_CONTEXTS,
    batches: Batches = ALL_BATCHES,
    tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate after a prompt.")] = DEFAULT.tokens,
    rounds: Rounds = DEFAULT.rounds,
    llama_cpp: LlamaCpp = None,
    vllm: Vllm = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Measure nothing: say which rows there are, and their state.")
    ] = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure all that docs/results.md shows, row by row, into a folder. Takes hours; stopped, it goes on where it was.

    Rows that are there with the same settings are kept. What a missing package keeps from being measured is recorded so.
    """
    options = Options(
        models=model_names(names(models)),
        tasks=tuple(names(tasks)),
        items=items,
        context=context,
        budgets=tuple(numbers("budgets", budgets, float)),
        families=tuple(names(families)),
        documents=documents,
        contexts=tuple(numbers("contexts", contexts)),
        batches=tuple(batch_sizes(batches)),
        tokens=tokens,
        rounds=rounds,
        seed=seed,
        dtype=dtype,
        device=device,
        llama_cpp=llama_cpp,
        vllm=vllm,
    )
    check_options(options)

    from headsink.bench.suite import run as all_bench

    with resumable(out_folder):
        done = (all_bench.states if listed else all_bench.run)(options, out_folder, only or ())
    if as_json:
        write(json.dumps(done, indent=1) + "\n")
    else:
        write("".join(f"{name:<40} {state}\n" for name, state in done.items()))


@bench.command(name="again")
def again(
    folder: Annotated[Path, typer.Argument(help="Folder that headsink bench all filled.")],
    row: Annotated[str, typer.Argument(help="Name of the row, such as quality/smollm2/gsm8k.")],
    models: Annotated[str, typer.Option(help="Where models are that are not built in, with commas.")] = _listed(
        DEFAULT.models
    ),
    llama_cpp: LlamaCpp = None,
    vllm: Vllm = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a row again and compare every figure with the one that is there. The folder stays as it is.

    Ends with exit status 1 if a figure lies outside the interval or range that was committed, or has changed where it should not.
    """
    if not folder.is_dir():
        raise HeadsinkError(f"{folder}: no such folder; name one that headsink bench all has filled")
    options = Options(models=model_names(names(models)), llama_cpp=llama_cpp, vllm=vllm, device=device)

    from headsink.bench.suite import run as all_bench

    found = all_bench.again(options, folder, row)
    if as_json:
        write(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    else:
        write("".join(f"{one.figure:<60} {one.before} -> {one.now}: {one.verdict}\n" for one in found))
    if any(one.verdict in ("outside", "changed") for one in found):
        raise typer.Exit(1)


@bench.command(name="results")
def results(
    folder: Annotated[Path, typer.Argument(help="Folder that headsink bench all filled.")],
    out_file: Annotated[
        Path, typer.Option("--out", help="The page (Markdown); pictures go into pictures/ beside it.")
    ] = Path("docs/results.md"),
    force: Force = False,
) -> None:
    """Write the page of results from the rows of a folder, and from nothing else."""
    check_file(out_file, force)
    if not folder.is_dir():
        raise HeadsinkError(f"{folder}: no such folder; name one that headsink bench all has filled")

    from headsink.bench.suite import page as results_bench

    results_bench.write(folder, out_file, force)
    write(f"{out_file}\n")


def check_options(options: Options) -> None:
    """Raise for what no row can be measured with."""
    for name in options.tasks:
        find_task(name)
    for budget in options.budgets:
        check_budget(budget)
    check_families(options.families, options.documents, options.texts, options.budget)
    check_contexts(options.contexts, options.tokens)


def named_plans(files: list[Path]) -> dict[str, Plan]:
    """Plans by the budgets that they were made for, or by their files where those do not tell them apart."""
    from headsink.plan.plan import Plan

    plans = [Plan.load(file) for file in files]
    budgets = [plan.calibration.get("budget") for plan in plans]
    named = all(isinstance(budget, int | float) for budget in budgets) and len(set(budgets)) == len(plans)
    names = [str(budget) if named else file.stem for budget, file in zip(budgets, files, strict=True)]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise HeadsinkError(f"plan: two files are called {repeated[0]}.json and were made for one budget; rename one")
    return dict(zip(names, plans, strict=True))


def _tell(result: dict[str, Any], tables: list[str], out_file: Path | None, force: bool, as_json: bool) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if out_file is not None:
        write_text(out_file, text, force)
    write(text if as_json else "\n".join(tables) + "\n")
