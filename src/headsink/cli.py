"""The command line. Every command is a thin layer over the Python interface.

Results go to standard output (`--json`: one JSON object and nothing else), progress to standard error. Bad input ends with exit
status 2 and one line that says what was wrong and what would be right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from typer.exceptions import TyperException

import headsink
from headsink import corpus, doctor, show
from headsink.census.census import MARKER
from headsink.errors import HeadsinkError
from headsink.files import check_replaceable, clear_errors
from headsink.generation import Conversation, chat_prompt
from headsink.generation import generate as generate_text
from headsink.plan import Plan

app = typer.Typer(
    name="headsink",
    help="Find the attention heads that look at nothing far away, and stop paying for them.",
    epilog="Begin with: headsink analyze smollm2 --out runs/a, then headsink plan smollm2 --budget 0.25 --out plan.json",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

Model = Annotated[
    str, typer.Argument(help="smollm2 (built in), a folder, a .gguf file, or a Hugging Face id owner/name.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices: texts, shuffles, sampling.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Plan file to run under; without it, the model itself.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy; above, sampling.")]


@app.command()
def analyze(
    model: Model = "smollm2",
    out_folder: Annotated[
        Path, typer.Option("--out", help="Folder for the census; an older census there is replaced.")
    ] = Path("runs/census"),
    lengths: Annotated[str, typer.Option(help="Text lengths in tokens, separated by commas.")] = "512,4096",
    domains: Annotated[str, typer.Option(help="Kinds of built-in text, separated by commas.")] = ",".join(
        corpus.DOMAINS
    ),
    texts_per_domain: Annotated[int, typer.Option(min=1, help="Texts of each kind.")] = 1,
    text_file: Annotated[
        list[Path] | None, typer.Option("--text", help="Your own text file instead; may be repeated.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """See what every attention head looks at: sinks, local heads, retrieval heads; with a report to open in a browser."""
    chosen, kinds = _numbers("lengths", lengths), [kind.strip() for kind in domains.split(",") if kind.strip()]
    texts = [_read(path) for path in text_file] if text_file else None
    check_replaceable(out_folder, MARKER)
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    census = headsink.analyze(
        loaded,
        tokenizer,
        lengths=chosen,
        domains=kinds,
        texts=texts,
        texts_per_domain=texts_per_domain,
        seed=seed,
    )
    census.save(out_folder)
    if as_json:
        _emit(show.census_json(census) | {"folder": str(out_folder)})
    else:
        show.census(out, census)
        out.print(f"\nReport: {out_folder / 'report.html'}", highlight=False)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a census.")],
    second: Annotated[Path, typer.Argument(help="Folder of another.")],
    as_json: Json = False,
) -> None:
    """Compare two census runs: how far heads moved, and which changed their role."""
    comparison = headsink.compare(first, second)
    if as_json:
        _emit(comparison.to_dict())
    else:
        show.comparison(out, comparison)


@app.command()
def plan(
    model: Model = "smollm2",
    budget: Annotated[float, typer.Option(help="Fraction of the KV cache to keep, above 0, at most 1.")] = 0.25,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context that the budget is for; the model's maximum.")
    ] = None,
    out_file: Annotated[Path, typer.Option("--out", help="Where the plan goes (JSON).")] = Path("plan.json"),
    quality_contexts: Annotated[
        str | None,
        typer.Option("--quality", help="Lengths to measure the plan at, separated by commas; 'none' to skip."),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Choose which keys each KV head keeps, under a budget, and measure what that costs. Takes minutes."""
    if not 0 < budget <= 1:
        raise HeadsinkError(f"budget: {budget} is outside (0, 1]; 0.25 keeps a quarter of the KV cache")
    measured = (
        None
        if quality_contexts is None
        else []
        if quality_contexts == "none"
        else _numbers("quality", quality_contexts)
    )
    with clear_errors(out_file):
        if out_file.is_dir():
            raise HeadsinkError(f"cannot write {out_file}: it is a folder, name a file")
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    longest = loaded.config.get_text_config(decoder=True).max_position_embeddings
    made = headsink.calibrate(
        loaded, tokenizer, budget=budget, context=context or longest, quality_contexts=measured, seed=seed
    )
    made.save(out_file)
    if as_json:
        _emit(json.loads(made.to_json()) | {"file": str(out_file)})
    else:
        show.plan(out, made)
        out.print(f"\nPlan: {out_file}", highlight=False)


@app.command()
def generate(
    model: Model = "smollm2",
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue; standard input if neither this nor --file.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the text, put before the prompt.")] = None,
    plan_file: PlanFile = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the model's chat format.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 200,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, under a plan or without, and say what it took."""
    text = "\n\n".join(part for part in (_read(file) if file else None, prompt) if part is not None)
    if file is None and prompt is None:
        text = sys.stdin.read()
    if not text.strip():
        raise HeadsinkError("prompt: it is empty; give --prompt TEXT, --file FILE, or text on standard input")
    chosen = Plan.load(plan_file) if plan_file else None
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    as_chat = not raw and tokenizer.chat_template is not None
    if as_chat:  # the chat format brings its own special tokens
        text = chat_prompt(tokenizer, [{"role": "user", "content": text}])
    ids = tokenizer(text, add_special_tokens=not as_chat, verbose=False)["input_ids"]
    torch.manual_seed(seed)
    done = generate_text(
        loaded,
        tokenizer,
        ids,
        chosen,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        show=None if as_json else _write,
    )
    if as_json:
        _emit(show.generated_json(done) | {"plan": str(plan_file) if plan_file else None})
    else:
        _write("\n")
        err.print(show.generated(done), style="dim", highlight=False)


@app.command()
def chat(
    model: Model = "smollm2",
    plan_file: PlanFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 500,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Talk to the model, under a plan or without; one line a turn, an empty line or ctrl-D ends. Answers stream."""
    chosen = Plan.load(plan_file) if plan_file else None
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    torch.manual_seed(seed)
    talk = Conversation(loaded, tokenizer, chosen, max_new_tokens=max_new_tokens, temperature=temperature)
    turns = []
    while True:
        if sys.stdin.isatty():
            err.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline()
        if not line.strip():
            break
        done = talk.ask(line.strip(), None if as_json else _write)
        turns.append({"question": line.strip(), **show.generated_json(done)})
        if not as_json:
            _write("\n")
            err.print(show.generated(done), style="dim", highlight=False)
    if as_json:
        _emit({"turns": turns, "plan": str(plan_file) if plan_file else None})


@app.command()
def models(as_json: Json = False) -> None:
    """List the built-in models, and say what else can be loaded."""
    found = doctor.models()
    if as_json:
        _emit(found)
    else:
        show.models(out, found)


@app.command(name="doctor")
def doctor_command(seed: Seed = 0, dtype: Dtype = None, device: Device = None, as_json: Json = False) -> None:
    """Check this machine: versions, devices, threads, models, and attention against its reference."""
    found = doctor.examine(device=device, dtype=dtype, seed=seed)
    if as_json:
        _emit(found)
    else:
        show.doctor(out, found)
    if not found["attention"]["right"]:
        raise typer.Exit(1)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise HeadsinkError(f"{name}: {text!r} is not a list of whole numbers such as 512,4096") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadsinkError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _emit(result: dict[str, Any]) -> None:
    _write(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Entry point: run a command and turn every error of the user's into one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except HeadsinkError as error:
        _fail(str(error))
    except TyperException as error:
        if error.format_message():
            _fail(f"{error.format_message().rstrip('.')}; see headsink --help")
        sys.exit(2)
    except typer.Abort:
        status = 130
    if status == 130:
        err.print("\nstopped", highlight=False)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    err.print(f"headsink: {message}", markup=False, highlight=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
