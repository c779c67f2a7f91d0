"""The commands that let a model answer: read (a document, once), generate, chat."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headsink.cli.options import Device, Dtype, Force, Json, Model, OtherWeights, Seed, plan_path, readable
from headsink.errors import HeadsinkError
from headsink.utils.files import check_file, check_text, read_input, read_text
from headsink.utils.terminal import emit, err, out, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headsink.plan.plan import Plan


PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Plan file to run under; without it, the model itself.", callback=plan_path),
]
Raw = Annotated[bool, typer.Option("--raw", help="Take the text as it is, without the model's chat format.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy; above, sampling.")]


def read(
    plan_file: Annotated[
        Path, typer.Option("--plan", help="Plan file: what is kept of the document.", callback=plan_path)
    ],
    model: Model = "smollm2",
    file: Annotated[Path | None, typer.Option(help="A file with the document; standard input if not given.")] = None,
    out_file: Annotated[Path, typer.Option("--out", help="Where what is kept goes (safetensors).")] = Path(
        "prefix.safetensors"
    ),
    raw: Raw = False,
    other_weights: OtherWeights = False,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Read a document once, and keep what the plan keeps of it in a file, for any number of questions later.

    Then: headsink generate --prefix prefix.safetensors --prompt "What does it say about X?"
    """
    check_file(out_file, force)
    document = read_text(file) if file else _standard_input("the document: it ends with ctrl-D")
    if not document.strip():
        raise HeadsinkError("file: it is empty; give --file FILE, or text on standard input")

    import torch

    import headsink
    from headsink.cache.cache import nbytes
    from headsink.cli import output
    from headsink.generation import templates
    from headsink.plan.plan import Plan
    from headsink.runtime.prefill import prefill
    from headsink.runtime.prefix import save_prefix

    plan = Plan.load(plan_file)
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    plan = plan.for_model(loaded) if other_weights else plan
    text, ids = templates.document_prompt(tokenizer, document, raw)
    start = time.perf_counter()
    cache = prefill(loaded, plan, torch.tensor([ids], device=loaded.device))
    seconds = time.perf_counter() - start
    save_prefix(out_file, cache, torch.tensor([ids]), text, force=force)
    found = {"prompt_tokens": len(ids), "seconds": seconds, "kv_bytes": nbytes(cache), "file": str(out_file)}
    if as_json:
        emit(found | {"plan": str(plan_file)})
    else:
        out.print(output.document_read(found), markup=False, highlight=False)


def generate(
    model: Model = "smollm2",
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue; standard input if neither this nor --file.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the text, put before the prompt.")] = None,
    prefix: Annotated[
        Path | None,
        typer.Option(help="A document that `headsink read` has read; the prompt comes after it.", callback=readable),
    ] = None,
    plan_file: PlanFile = None,
    raw: Raw = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 200,
    temperature: Temperature = 0.0,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless",
            help="The plan drafts and the model verifies: its own text, faster at most; the full KV cache is kept too.",
        ),
    ] = False,
    other_weights: OtherWeights = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, under a plan or without, and say what it took."""
    if prefix is not None and (file is not None or plan_file is not None or raw):
        raise HeadsinkError(
            "prefix: it has a plan, a document and a format of its own; leave out --plan, --file, --raw"
        )
    if lossless and plan_file is None:
        raise HeadsinkError("lossless: it needs a plan that drafts: --plan FILE")
    _check_other_weights(other_weights, plan_file)
    text = "\n\n".join(part for part in (read_text(file) if file else None, prompt) if part is not None)
    if file is None and prompt is None:
        text = _standard_input("the prompt: it ends with ctrl-D")
    if not text.strip():
        raise HeadsinkError("prompt: it is empty; give --prompt TEXT, --file FILE, or text on standard input")
    check_text(text, "prompt: it")

    import torch

    import headsink
    from headsink.cli import output
    from headsink.generation import generate, templates
    from headsink.generation.templates import chat_prompt, encode
    from headsink.plan.plan import Plan
    from headsink.runtime.prefix import load_prefix, prefix_text

    plan, before = Plan.load(plan_file) if plan_file else None, prefix_text(prefix) if prefix else None
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    plan = plan.for_model(loaded) if plan is not None and other_weights else plan
    cache = None
    if prefix is not None and before is not None:
        cache, seen = load_prefix(prefix, loaded)
        if len(seen) > 1:
            raise HeadsinkError(f"prefix: it holds {len(seen)} texts, a prompt can follow one only")
        plan, ids = cache.plan, seen[0].tolist() + templates.question_prompt(tokenizer, before, text)
    else:
        as_chat = not raw and tokenizer.chat_template is not None
        if as_chat:  # the chat format brings its own special tokens
            text = chat_prompt(tokenizer, [{"role": "user", "content": text}])
        ids = encode(tokenizer, text, special=not as_chat)
    _compile(loaded, plan)
    torch.manual_seed(seed)
    done = generate.generate(
        loaded,
        tokenizer,
        ids,
        plan,
        cache=cache,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        show=None if as_json else write,
        lossless=lossless,
    )
    if as_json:
        files = {"plan": str(plan_file) if plan_file else None, "prefix": str(prefix) if prefix else None}
        emit(output.generated_json(done) | files)
    else:
        write("\n")
        err.print(output.generated(done), style="dim", highlight=False)


def _check_other_weights(other_weights: bool, plan_file: Path | None) -> None:
    if other_weights and plan_file is None:
        raise HeadsinkError("other-weights: it needs a plan that was made for other weights: --plan FILE")


def _compile(model: PreTrainedModel, plan: Plan | None) -> None:
    """Before the clock starts."""
    from headsink.generation.decode import prepare, refusal

    if plan is not None and refusal(model) is None:
        with err.status("compiling: half a minute, once on a machine"):
            prepare(model)


def _standard_input(what: str) -> str:
    if sys.stdin.isatty():
        err.print(f"type {what}", style="dim", highlight=False)
    return read_input()


def chat(
    model: Model = "smollm2",
    plan_file: PlanFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 500,
    temperature: Temperature = 0.0,
    other_weights: OtherWeights = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Talk to the model, under a plan or without; one line a turn, an empty line or ctrl-D ends. Answers stream."""
    _check_other_weights(other_weights, plan_file)
    import torch

    import headsink
    from headsink.cli import output
    from headsink.generation.chat import Conversation
    from headsink.plan.plan import Plan

    chosen = Plan.load(plan_file) if plan_file else None
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    chosen = chosen.for_model(loaded) if chosen is not None and other_weights else chosen
    _compile(loaded, chosen)
    torch.manual_seed(seed)
    talk = Conversation(loaded, tokenizer, chosen, max_new_tokens=max_new_tokens, temperature=temperature)
    turns = []
    while True:
        if sys.stdin.isatty():
            err.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline()
        if not line.strip():
            break
        done = talk.ask(line.strip(), None if as_json else write)
        turns.append({"question": line.strip(), **output.generated_json(done)})
        if not as_json:
            write("\n")
            err.print(output.generated(done), style="dim", highlight=False)
    if as_json:
        emit({"turns": turns, "plan": str(plan_file) if plan_file else None})
