"""The command line. Every command is a thin layer over the Python interface.

Results go to standard output (`--json`: one JSON object and nothing else), progress to standard error. Bad input ends with exit
status 2 and one line that says what was wrong and what would be right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headsink.calibration.method import POLICIES, SEVERAL_WINDOWS, TOP_K, WINDOWS, Method
from headsink.census.options import CENSUS, QUERIES, TAU, check_census, check_lengths, check_tau, run_parts
from headsink.cli.bench import bench
from headsink.cli.generate import chat, generate, read
from headsink.cli.options import (
    MODEL_HELP,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Seed,
    context_range,
    known_model,
    memory,
    names,
    numbers,
)
from headsink.cli.serve import PASS_ON, serve
from headsink.data import corpus
from headsink.data import prompts as prompt_files
from headsink.data.domains import KINDS, check_census_domains, check_domains
from headsink.errors import HeadsinkError, printable
from headsink.evaluation.options import (
    FRONTIER,
    FRONTIER_BUDGETS,
    check_budget,
    check_context,
    check_max_kl,
    check_quality,
)
from headsink.models.builtin import BUILT_IN, processes
from headsink.utils.files import check_file, check_replaceable, new_folder
from headsink.utils.terminal import emit, note, out, resumable, run

COMPARISON = "comparison.json"  # marks a folder of figures as one of ours

app = typer.Typer(
    name="headsink",
    help="Find the attention heads that look at nothing far away, and stop paying for them.",
    epilog="Begin with: headsink analyze smollm2 --out runs/a, then headsink plan smollm2 --budget 0.25 --out plan.json",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
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
    """Find the attention heads that look at nothing far away, and stop paying for them."""


@app.command()
def analyze(
    model: Annotated[
        str | None, typer.Argument(help=f"{MODEL_HELP} smollm2 if not given.", callback=known_model)
    ] = None,
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
        float, typer.Option(help="Keys with a value norm below tau of the head's median can be secondary sinks.")
    ] = TAU,
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
    check_lengths(chosen or ())
    kinds = check_census_domains(names(domains))
    check_tau(tau)
    texts = prompt_files.read(text_file or [], prompts or [], prompt or [])
    where: dict[str, Any] = {"device": device, "max_memory": memory(max_memory), "tensor_parallel": tensor_parallel}
    if (device is not None) + (max_memory is not None) + tensor_parallel > 1:
        raise HeadsinkError("device: give one of --device, --max-memory and --tensor-parallel")
    if tensor_parallel:
        processes()
    if again is not None:
        check_census(again)
    check_replaceable(out_folder, CENSUS, force)

    import headsink
    from headsink.census.head_statistics import Thresholds
    from headsink.census.run import analyze_again, remove_checkpoint
    from headsink.cli import output
    from headsink.models.distributed import is_main

    checkpoint = out_folder.parent / f".{out_folder.name}.partial"
    with resumable(checkpoint):
        if again is not None:
            settings = headsink.Census.load(again).settings
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
    if not is_main():
        return
    headsink.write_report(census, out_folder, force=force)
    remove_checkpoint(checkpoint)
    if as_json:
        emit(output.census_json(census) | {"folder": str(out_folder)})
    else:
        output.census(out, census)
        out.print(f"\nReport: {printable(str(out_folder / 'report.html'))}", markup=False, highlight=False)


def _source(again: Path, source: str) -> str:
    """The model of a census, if it is on this machine: what a file names is not fetched from a network."""
    if source in BUILT_IN or Path(source).exists():
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
    for one in runs:
        check_census(Path(run_parts(str(one))[0]))

    import headsink
    from headsink.cli import output
    from headsink.report.comparison import write_comparison, write_comparison_pictures

    comparison = headsink.compare(*runs)
    if report_file is not None:
        write_comparison(comparison, report_file, force=force)
    if figures is not None:
        with new_folder(figures, COMPARISON, force) as part:
            write_comparison_pictures(comparison, part)
            (part / COMPARISON).write_text(json.dumps(comparison.to_dict(), indent=1), encoding="utf-8")
    if as_json:
        emit(comparison.to_dict() | {"report": None if report_file is None else str(report_file)})
    else:
        output.comparison(out, comparison)
        if report_file is not None:
            out.print(f"\nReport: {printable(str(report_file))}", markup=False, highlight=False)


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
    prefill_compression: Annotated[
        bool,
        typer.Option(
            "--prefill-compression", help="For contexts that are read in full and compressed once, before an answer."
        ),
    ] = False,
    reconstruct: Annotated[
        bool,
        typer.Option(
            "--reconstruct",
            help="As --prefill-compression, and the model tells a context again before: the best quality, for a second reading.",
        ),
    ] = False,
    no_top_k: Annotated[
        bool,
        typer.Option(
            "--no-top-k",
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
            help="absolute, or cache-relative: for streaming generation beyond the model's maximum; needs --policy streaming-llm."
        ),
    ] = "absolute",
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
    if max_kl is not None:
        check_max_kl(max_kl)
    wanted = None if context is None else context_range(context)
    if wanted is not None:
        check_context(*(wanted if isinstance(wanted, tuple) else (wanted, wanted)))
    kinds = check_domains(names(domains))
    if positions not in ("absolute", "cache-relative"):
        raise HeadsinkError(f"positions: {positions!r} is neither absolute nor cache-relative")
    if no_top_k and policy != "headsink":
        raise HeadsinkError(f"no-top-k: the policy {policy} has no top-k keys anyway; leave one of the two out")
    method = Method(
        policy=policy,  # type: ignore[arg-type]
        prefill_compression=prefill_compression or reconstruct,
        reconstruct=reconstruct,
        positions=positions,  # type: ignore[arg-type]
        ranks=tensor_parallel,
        windows=SEVERAL_WINDOWS if no_top_k else WINDOWS,
        top_k=(0.0,) if no_top_k else TOP_K,
    )
    measured: list[int] | None = [] if quality_contexts == "none" else None
    if measured is None and quality_contexts is not None:
        measured = numbers("quality", quality_contexts)
        check_quality(measured, name="quality")
    if frontier_folder is not None:
        check_replaceable(frontier_folder, FRONTIER, force)
    else:
        check_file(out_file, force)
    shares = FRONTIER_BUDGETS if budgets is None else numbers("budgets", budgets, float)
    for share in shares:
        check_budget(share)

    import headsink
    from headsink.cli import output

    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    if wanted is None:
        wanted = loaded.config.get_text_config(decoder=True).max_position_embeddings
    if frontier_folder is not None:
        from headsink.calibration.frontier import frontier
        from headsink.report.frontier import write_frontier

        drawn = frontier(loaded, tokenizer, context=wanted, budgets=shares, method=method, domains=kinds, seed=seed)
        write_frontier(drawn, frontier_folder, force=force)
        if as_json:
            emit(drawn.to_dict() | {"folder": str(frontier_folder)})
        else:
            output.frontier(out, drawn)
            out.print(f"\nChart: {printable(str(frontier_folder / 'frontier.html'))}", markup=False, highlight=False)
        return
    checkpoint = out_file.with_name(f".{out_file.name}.partial")
    with resumable(checkpoint):
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
    made.save(out_file, force=force)
    checkpoint.unlink(missing_ok=True)
    if as_json:
        emit(json.loads(made.to_json()) | {"file": str(out_file)})
    else:
        output.plan(out, made)
        out.print(f"\nPlan: {printable(str(out_file))}", markup=False, highlight=False)


for command in (read, generate, chat):
    app.command()(command)
app.command(context_settings=PASS_ON)(serve)


@app.command()
def models(as_json: Json = False) -> None:
    """List the built-in models, and say what else can be loaded."""
    from headsink.cli import doctor

    found = doctor.models()
    if as_json:
        emit(found)
    else:
        doctor.print_models(found)


@app.command(name="doctor")
def doctor_command(seed: Seed = 0, dtype: Dtype = None, device: Device = None, as_json: Json = False) -> None:
    """Check this machine: versions, devices, threads, models, and attention against its reference."""
    from headsink.cli import doctor

    if warning := doctor.transformers_warning():
        note(warning)  # first: what was not tested may not even import
    found = doctor.examine(device=device, dtype=dtype, seed=seed)
    if as_json:
        emit(found)
    else:
        doctor.print_examination(found)
    if not found["attention"]["right"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
