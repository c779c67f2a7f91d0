"""The commands that let a model answer: read (a document, once), generate, chat."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel

import headsink
from headsink import generation, show
from headsink.cache import nbytes
from headsink.decode import prepare, refusal
from headsink.errors import HeadsinkError
from headsink.files import check_file, read_text
from headsink.generation import Conversation, chat_prompt, encode
from headsink.options import Device, Dtype, Json, Model, Seed
from headsink.plan import Plan
from headsink.prefix import load_prefix, prefix_text, save_prefix

PlanFile = Annotated[Path | None, typer.Option("--plan", help="Plan file to run under; without it, the model itself.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take the text as it is, without the model's chat format.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy; above, sampling.")]


def read(
    plan_file: Annotated[Path, typer.Option("--plan", help="Plan file: what is kept of the document.")],
    model: Model = "smollm2",
    file: Annotated[Path | None, typer.Option(help="A file with the document; standard input if not given.")] = None,
    out_file: Annotated[Path, typer.Option("--out", help="Where what is kept goes (safetensors).")] = Path(
        "prefix.safetensors"
    ),
    raw: Raw = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Read a document once, and keep what the plan keeps of it in a file, for any number of questions later.

    Then: headsink generate --prefix prefix.safetensors --prompt "What does it say about X?"
    """
    check_file(out_file)
    plan = Plan.load(plan_file)
    document = read_text(file) if file else sys.stdin.read()
    if not document.strip():
        raise HeadsinkError("file: it is empty; give --file FILE, or text on standard input")
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    text, ids = generation.document_prompt(tokenizer, document, raw)
    start = time.perf_counter()
    cache = generation.read(loaded, plan, ids)
    seconds = time.perf_counter() - start
    save_prefix(out_file, cache, torch.tensor([ids]), text)
    found = {"prompt_tokens": len(ids), "seconds": seconds, "kv_bytes": nbytes(cache), "file": str(out_file)}
    if as_json:
        show.emit(found | {"plan": str(plan_file)})
    else:
        show.out.print(show.document_read(found), highlight=False)


def generate(
    model: Model = "smollm2",
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue; standard input if neither this nor --file.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the text, put before the prompt.")] = None,
    prefix: Annotated[
        Path | None, typer.Option(help="A document that `headsink read` has read; the prompt comes after it.")
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
    text = "\n\n".join(part for part in (read_text(file) if file else None, prompt) if part is not None)
    if file is None and prompt is None:
        text = sys.stdin.read()
    if not text.strip():
        raise HeadsinkError("prompt: it is empty; give --prompt TEXT, --file FILE, or text on standard input")
    plan, before = Plan.load(plan_file) if plan_file else None, prefix_text(prefix) if prefix else None
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    cache = None
    if prefix is not None and before is not None:
        cache, seen = load_prefix(prefix, loaded)
        if len(seen) > 1:
            raise HeadsinkError(f"prefix: it holds {len(seen)} texts, a prompt can follow one only")
        plan, ids = cache.plan, seen[0].tolist() + generation.question_prompt(tokenizer, before, text)
    else:
        as_chat = not raw and tokenizer.chat_template is not None
        if as_chat:  # the chat format brings its own special tokens
            text = chat_prompt(tokenizer, [{"role": "user", "content": text}])
        ids = encode(tokenizer, text, special=not as_chat)
    _compile(loaded, plan)
    torch.manual_seed(seed)
    done = generation.generate(
        loaded,
        tokenizer,
        ids,
        plan,
        cache=cache,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        show=None if as_json else show.write,
        lossless=lossless,
    )
    if as_json:
        files = {"plan": str(plan_file) if plan_file else None, "prefix": str(prefix) if prefix else None}
        show.emit(show.generated_json(done) | files)
    else:
        show.write("\n")
        show.err.print(show.generated(done), style="dim", highlight=False)


def _compile(model: PreTrainedModel, plan: Plan | None) -> None:
    """Before the clock starts."""
    if plan is not None and refusal(model) is None:
        with show.err.status("compiling: half a minute, once on a machine"):
            prepare(model)


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
    _compile(loaded, chosen)
    torch.manual_seed(seed)
    talk = Conversation(loaded, tokenizer, chosen, max_new_tokens=max_new_tokens, temperature=temperature)
    turns = []
    while True:
        if sys.stdin.isatty():
            show.err.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline()
        if not line.strip():
            break
        done = talk.ask(line.strip(), None if as_json else show.write)
        turns.append({"question": line.strip(), **show.generated_json(done)})
        if not as_json:
            show.write("\n")
            show.err.print(show.generated(done), style="dim", highlight=False)
    if as_json:
        show.emit({"turns": turns, "plan": str(plan_file) if plan_file else None})
