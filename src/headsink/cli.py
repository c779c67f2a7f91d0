"""The command line. Every command is a thin layer over the Python interface.

Results go to standard output (`--json`: one JSON object and nothing else), progress to standard error. Bad input ends with exit
status 2 and one line that says what was wrong and what would be right.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import headsink
from headsink import corpus, doctor, prompt_files, show
from headsink import models as models_module
from headsink.answering import chat, generate, read
from headsink.bench.cli import bench
from headsink.calibrate import KINDS, check_budget, check_domains
from headsink.census.census import MARKER, Census
from headsink.census.run import analyze_again, remove_checkpoint
from headsink.census.statistics import QUERIES, Thresholds
from headsink.errors import HeadsinkError, printable
from headsink.files import check_file, check_replaceable, new_folder, reason
from headsink.frontier import BUDGETS as FRONTIER_BUDGETS
from headsink.frontier import FRONTIER, frontier
from headsink.options import MODEL_HELP, Device, Dtype, Force, Json, Model, Seed, context_range, memory, numbers
from headsink.report import write_comparison, write_comparison_pictures
from headsink.search import FLOATING, POLICIES, SEVERAL_WINDOWS, WINDOWS, Method
from headsink.serving import PASS_ON, serve
from headsink.sharding import is_main

COMPARISON = "comparison.json"  # marks a folder of figures as one of ours

app = typer.Typer(
    name="headsink",
    help="Find the attention heads that look at nothing far away, and stop paying for them.",
    epilog="Begin with: headsink analyze smollm2 --out runs/a, then headsink plan smollm2 --budget 0.25 --out plan.json",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


@app.command()
def analyze(
    model: Annotated[str | None, typer.Argument(help=f"{MODEL_HELP} smollm2 if not given.")] = None,
    out_folder: Annotated[
        Path, typer.Option("--out", help="Folder for the census; an older census there is replaced.")
    ] = Path("runs/census"),
    lengths: Annotated[
        str | None,
        typer.Option(help="Text lengths in tokens, separated by commas; 512,4096, or what your own texts have."),
    ] = None,
    domains: Annotated[str, typer.Option(help="Kinds of built-in text, separated by commas.")] = ",".join(
        corpus.CENSUS_DOMAINS
    ),
    texts_per_domain: Annotated[
        int, typer.Option(min=1, help="Texts of each kind; intervals are over texts, so 2 or more.")
    ] = 2,
    text_file: Annotated[
        list[Path] | None, typer.Option("--text", help="A text file of your own instead; may be repeated.")
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompts of your own instead: a file with one a line, or JSONL with {prompt: ..., domain: ...}; may be repeated."
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of your own instead; may be repeated.")] = None,
    queries: Annotated[
        int, typer.Option(min=2, help="Queries read at each length, evenly spaced, where more would count.")
    ] = QUERIES,
    tau: Annotated[
        float, typer.Option(help="Keys with a value norm below tau of the head's median can be floating sinks.")
    ] = Thresholds.tau,
    again: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a census: make it again, with its texts and settings; other options are ignored. Name MODEL too "
            "if its model is not on this machine."
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="For a model larger than memory: most weights a device holds, as in cpu=30GB or 0=20GB,cpu=30GB."
        ),
    ] = None,
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Under torchrun: split every layer over its processes.")
    ] = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """See what every attention head looks at: sinks, local heads, retrieval heads; with a report to open in a browser.

    Stopped, it goes on where it was when it is started again with the same options.
    """
    chosen = None if lengths is None else numbers("lengths", lengths)
    kinds = [kind.strip() for kind in domains.split(",") if kind.strip()]
    if not 0 < tau <= 1:
        raise HeadsinkError(f"tau: {tau} is outside (0, 1]")
    texts = prompt_files.read(text_file or [], prompts or [], prompt or [])
    check_replaceable(out_folder, MARKER, force)
    checkpoint = out_folder.parent / f".{out_folder.name}.partial"
    where: dict[str, Any] = {"device": device, "max_memory": memory(max_memory), "tensor_parallel": tensor_parallel}
    try:
        if again is not None:
            settings = Census.load(again).settings
            source = model or _source(again, settings["model"]["source"])
            loaded, tokenizer = headsink.load(source, dtype=settings["dtype"], **where)
            census = analyze_again(loaded, tokenizer, settings, checkpoint=checkpoint)
        else:
            loaded, tokenizer = headsink.load(model or "smollm2", dtype=dtype, **where)
            census = headsink.analyze(
                loaded,
                tokenizer,
                lengths=chosen,
                domains=kinds,
                texts=texts,
                texts_per_domain=texts_per_domain,
                limits=Thresholds(tau=tau),
                queries=queries,
                seed=seed,
                checkpoint=checkpoint,
            )
    except KeyboardInterrupt:
        if checkpoint.exists():
            show.err.print("\nwhat is done is kept: start it again to go on", highlight=False)
        raise
    if not is_main():
        return
    census.save(out_folder, force=force)
    remove_checkpoint(checkpoint)
    if as_json:
        show.emit(show.census_json(census) | {"folder": str(out_folder)})
    else:
        show.census(show.out, census)
        show.out.print(f"\nReport: {printable(str(out_folder / 'report.html'))}", markup=False, highlight=False)


def _source(again: Path, source: str) -> str:
    """The model of a census, if it is on this machine: what a file names is not fetched from a network."""
    if source in models_module.BUILT_IN or Path(source).exists():
        return source
    raise HeadsinkError(
        f"again: {again} was made with the model {source!r}, which is not on this machine; if you want that one fetched or have "
        f"it elsewhere, name it: headsink analyze MODEL --again {again}"
    )


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of two or more census runs; FOLDER@512 and FOLDER@512:code name a part."),
    ],
    report_file: Annotated[
        Path | None, typer.Option("--out", help="Write the comparison as an HTML report too.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for its maps as PNG and SVG; older ones there are replaced.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare census runs with the first: how far heads moved, what of it is more than chance, which changed their role.

    Two lengths or two kinds of text of one run: headsink compare runs/a@512 runs/a@4096
    """
    if report_file is not None:
        check_file(report_file, force)
    if figures is not None:
        check_replaceable(figures, COMPARISON, force)
    comparison = headsink.compare(*runs)
    if report_file is not None:
        write_comparison(comparison, report_file, force=force)
    if figures is not None:
        with new_folder(figures, COMPARISON, force) as part:
            write_comparison_pictures(comparison, part)
            (part / COMPARISON).write_text(json.dumps(comparison.to_dict(), indent=1), encoding="utf-8")
    if as_json:
        show.emit(comparison.to_dict() | {"report": None if report_file is None else str(report_file)})
    else:
        show.comparison(show.out, comparison)
        if report_file is not None:
            show.out.print(f"\nReport: {printable(str(report_file))}", markup=False, highlight=False)


@app.command()
def plan(
    model: Model = "smollm2",
    budget: Annotated[
        float | None, typer.Option(help="Fraction of the KV cache to keep, above 0, at most 1; 0.25 if not given.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: the KL of text, in nats a token, not to be exceeded; 0.02 is little."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Tokens of context that the plan is for, or a range as in 2000-8000; the model's maximum."),
    ] = None,
    policy: Annotated[str, typer.Option(help=f"How patterns are chosen: {', '.join(POLICIES)}.")] = "headsink",
    out_file: Annotated[Path, typer.Option("--out", help="Where the plan goes (JSON).")] = Path("plan.json"),
    quality_contexts: Annotated[
        str | None,
        typer.Option("--quality", help="Lengths to measure the plan at, separated by commas; 'none' to skip."),
    ] = None,
    frontier_folder: Annotated[
        Path | None,
        typer.Option("--frontier", help="Make plans of several budgets instead, with a chart of what they cost, here."),
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="The budgets of --frontier, separated by commas.")] = None,
    domains: Annotated[
        str, typer.Option(help=f"Kinds of text to calibrate on, separated by commas: {', '.join(KINDS)}.")
    ] = ",".join(corpus.DOMAINS),
    once: Annotated[
        bool, typer.Option("--once", help="For contexts that are read in full and compressed once, before an answer.")
    ] = False,
    retell: Annotated[
        bool,
        typer.Option(
            "--retell",
            help="As --once, and the model tells a context again before: the best quality, for a second reading.",
        ),
    ] = False,
    no_floating: Annotated[
        bool,
        typer.Option(
            "--no-floating",
            help="First tokens and windows of several sizes only, which vLLM can serve (headsink serve).",
        ),
    ] = False,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="For serving on so many GPUs: heads in the same place of different ranks keep alike, so that no rank is fuller.",
        ),
    ] = 1,
    positions: Annotated[
        str,
        typer.Option(
            help="text, or cache: of texts without end, far beyond the model's maximum; needs --policy streaming-llm."
        ),
    ] = "text",
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Choose which keys each KV head keeps, under a budget, and measure what that costs. Takes minutes.

    Stopped, it goes on where it was when it is started again with the same options.
    """
    if budget is not None and max_kl is not None:
        raise HeadsinkError("max-kl: give a budget or --max-kl, one of the two")
    budget = 0.25 if budget is None and max_kl is None else budget
    if budget is not None:
        check_budget(budget)
    kinds = check_domains([kind.strip() for kind in domains.split(",") if kind.strip()])
    if positions not in ("text", "cache"):
        raise HeadsinkError(f"positions: {positions!r} is neither text nor cache")
    if no_floating and policy != "headsink":
        raise HeadsinkError(f"no-floating: the policy {policy} has no floating keys anyway; leave one of the two out")
    method = Method(
        policy=policy,  # type: ignore[arg-type]
        once=once or retell,
        retell=retell,
        positions=positions,  # type: ignore[arg-type]
        ranks=tensor_parallel,
        windows=SEVERAL_WINDOWS if no_floating else WINDOWS,
        floating=(0.0,) if no_floating else FLOATING,
    )
    measured: list[int] | None = [] if quality_contexts == "none" else None
    if measured is None and quality_contexts is not None:
        measured = numbers("quality", quality_contexts)
    if frontier_folder is not None:
        check_replaceable(frontier_folder, FRONTIER, force)
    else:
        check_file(out_file, force)
    shares = FRONTIER_BUDGETS if budgets is None else numbers("budgets", budgets, float)
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    longest = loaded.config.get_text_config(decoder=True).max_position_embeddings
    wanted = longest if context is None else context_range(context)
    if frontier_folder is not None:
        drawn = frontier(loaded, tokenizer, context=wanted, budgets=shares, method=method, domains=kinds, seed=seed)
        drawn.save(frontier_folder, force=force)
        if as_json:
            show.emit(drawn.to_dict() | {"folder": str(frontier_folder)})
        else:
            show.frontier(show.out, drawn)
            show.out.print(
                f"\nChart: {printable(str(frontier_folder / 'frontier.html'))}", markup=False, highlight=False
            )
        return
    checkpoint = out_file.with_name(f".{out_file.name}.partial")
    try:
        made = headsink.calibrate(
            loaded,
            tokenizer,
            budget=budget,
            max_kl=max_kl,
            context=wanted,
            method=method,
            quality_contexts=measured,
            domains=kinds,
            seed=seed,
            checkpoint=checkpoint,
        )
    except KeyboardInterrupt:
        if checkpoint.exists():
            show.err.print("\nwhat is done is kept: start it again to go on", highlight=False)
        raise
    made.save(out_file, force=force)
    checkpoint.unlink(missing_ok=True)
    if as_json:
        show.emit(json.loads(made.to_json()) | {"file": str(out_file)})
    else:
        show.plan(show.out, made)
        show.out.print(f"\nPlan: {printable(str(out_file))}", markup=False, highlight=False)


for command in (read, generate, chat):
    app.command()(command)
app.command(context_settings=PASS_ON)(serve)


@app.command()
def models(as_json: Json = False) -> None:
    """List the built-in models, and say what else can be loaded."""
    found = doctor.models()
    if as_json:
        show.emit(found)
    else:
        show.models(show.out, found)


@app.command(name="doctor")
def doctor_command(seed: Seed = 0, dtype: Dtype = None, device: Device = None, as_json: Json = False) -> None:
    """Check this machine: versions, devices, threads, models, and attention against its reference."""
    found = doctor.examine(device=device, dtype=dtype, seed=seed)
    if as_json:
        show.emit(found)
    else:
        show.doctor(show.out, found)
    if not found["attention"]["right"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: run a command and turn every error of the user's into one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:  # not of a stream: a fault of headsink's own
            raise
        _drop_output()
        _fail(f"cannot write standard output: {reason(error)}")
    except HeadsinkError as error:
        _fail(str(error))
    except TyperException as error:
        if error.format_message():
            _fail(f"{error.format_message().rstrip('.')}; see headsink --help")
        sys.exit(2)
    except typer.Abort:
        status = 130
    if status == 130:
        show.err.print("\nstopped", highlight=False)
    sys.exit(status if isinstance(status, int) else 0)


def _drop_output() -> None:
    """Send what is still to be written to standard output nowhere, or Python fails on it again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _fail(message: str) -> None:
    show.err.print(f"headsink: {printable(message)}", markup=False, highlight=False, emoji=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
