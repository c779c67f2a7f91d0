"""`headsink generate`: answer one prompt, under a plan or with the full cache, after a saved document or without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import headsink
from headsink.cli.loading import compile_step, load_with_plan
from headsink.cli.options import (
    Budget,
    KVDtype,
    Model,
    OtherWeights,
    PlanFile,
    Raw,
    Reconstruct,
    RunOptions,
    Seed,
    Temperature,
    check_other_weights,
    check_plan_choice,
    readable,
    standard_input,
)
from headsink.cli.output import generated_json, summarize_generation
from headsink.errors import HeadsinkError
from headsink.plan.packaged import packaged_plan
from headsink.runtime.options import check_prefill
from headsink.utils.files import check_text, read_text
from headsink.utils.terminal import emit, err, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headsink.cache.cache import PlanCache


@dataclass(frozen=True)
class GenerateOptions(RunOptions):
    """Options of `headsink generate`."""

    model: Model = "smollm2"
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue; standard input if neither this nor --file.")
    ] = None
    file: Annotated[Path | None, typer.Option(help="A file with the text, put before the prompt.")] = None
    prefix: Annotated[
        Path | None,
        typer.Option(help="A document that `headsink prefill` has read; the prompt comes after it.", callback=readable),
    ] = None
    plan_file: PlanFile = None
    budget: Budget = None
    reconstruct: Reconstruct = False
    prefill: Annotated[
        str,
        typer.Option(
            help="dense reads the prompt in full attention, then evicts; sparse evicts while it reads: lower TTFT, less quality."
        ),
    ] = "dense"
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="With dense prefill, also evict after every so many tokens of the prompt.")
    ] = None
    kv_dtype: KVDtype = "auto"
    raw: Raw = False
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 200
    temperature: Temperature = 0.0
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless",
            help="Speculative decoding: the full cache's output. On a CPU drafts come from the text, on a GPU from the plan.",
        ),
    ] = False
    other_weights: OtherWeights = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.prefix is not None and (self.file is not None or self.planned or self.raw):
            raise HeadsinkError(
                "prefix: it has a plan, a document and a format of its own; leave out --plan, --budget, --file, --raw"
            )
        if self.prefix is not None and self.kv_dtype != "auto":
            raise HeadsinkError("kv-dtype: a prefix is cached in the dtype that it was read in; leave out --kv-dtype")
        if self.prefix is not None and self.lossless:
            raise HeadsinkError("lossless: it needs every key of the text, a prefix has lost some; leave out --prefix")
        check_plan_choice(self.model, self.plan_file, self.budget)
        if self.reconstruct and (not self.planned or self.lossless):
            raise HeadsinkError("reconstruct: it needs a plan without --lossless: --plan FILE, or --budget")
        check_prefill(self.prefill, self.chunk_size, "chunk-size")
        changed = self.prefill == "sparse" or self.chunk_size is not None
        if changed and (not self.planned or self.lossless or self.reconstruct):
            raise HeadsinkError(
                "prefill: --prefill sparse and --chunk-size need a plan, --plan FILE or --budget, without --lossless and "
                "--reconstruct"
            )
        check_other_weights(self.other_weights, self.plan_file)

    @property
    def planned(self) -> bool:
        """Whether the prompt is read under a plan."""
        return self.plan_file is not None or self.budget is not None

    def text(self) -> str:
        """The text of the file and the prompt, or of standard input."""
        if self.file is None and self.prompt is None:
            found = standard_input("the prompt: it ends with ctrl-D")
        else:
            parts = (read_text(self.file) if self.file else None, self.prompt)
            found = "\n\n".join(part for part in parts if part is not None)
        if not found.strip():
            raise HeadsinkError("prompt: it is empty; give --prompt TEXT, --file FILE, or text on standard input")
        check_text(found, "prompt: it")
        return found


def generate(options: GenerateOptions) -> None:
    """Answer a prompt, under a plan or without, and say what it took."""
    text = options.text()

    import torch

    from headsink.generation.generate import generate as generate_text
    from headsink.runtime.prefix import prefix_text

    before = prefix_text(options.prefix) if options.prefix else None
    model, tokenizer, plan = load_with_plan(
        options.model, options.plan_file, options.other_weights, dtype=options.dtype, device=options.device
    )
    cache = None
    if options.prefix is not None and before is not None:
        cache, ids = _question(model, tokenizer, options.prefix, before, text)
        plan = cache.plan
    else:
        ids = _prompt(tokenizer, text, options.raw)
    if options.budget is not None:
        plan = packaged_plan(options.model, options.budget, len(ids) + options.max_new_tokens)
    dtype: Any = options.kv_dtype if cache is None else cache.kv_dtype
    if plan is not None and cache is None and not options.lossless:
        how: dict[str, Any] = {"prefill": options.prefill, "chunk_size": options.chunk_size}
        cache = headsink.new_cache(model, plan, exact=False, kv_dtype=dtype, **how)
    compile_step(model, headsink.Plan.full(model) if plan is None and options.lossless else plan, dtype)
    torch.manual_seed(options.seed)
    done = generate_text(
        model,
        tokenizer,
        ids,
        plan,
        cache=cache,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        show=None if options.as_json else write,
        lossless=options.lossless,
        reconstruct=options.reconstruct,
        kv_dtype=dtype,
    )
    if options.as_json:
        files = {"plan": options.plan_file, "prefix": options.prefix}
        named = {name: str(file) if file else None for name, file in files.items()}
        emit(generated_json(done) | named | {"budget": options.budget})
    else:
        write("\n")
        err.print(summarize_generation(done), style="dim", highlight=False)


def _question(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefix: Path, before: str, text: str
) -> tuple[PlanCache, list[int]]:
    """The cache of a document that was read, and the tokens of the document and the question after it."""
    from headsink.generation.templates import question_prompt

    cache, seen = headsink.load_prefix(prefix, model)
    if len(seen) > 1:
        raise HeadsinkError(f"prefix: it holds {len(seen)} texts, a prompt can follow one only")
    return cache, seen[0].tolist() + question_prompt(tokenizer, before, text)


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool) -> list[int]:
    """The tokens of a prompt, in the model's chat format if it has one."""
    from headsink.generation.templates import chat_prompt, encode

    if raw or tokenizer.chat_template is None:
        return encode(tokenizer, text, special=True)
    text = chat_prompt(tokenizer, [{"role": "user", "content": text}])
    return encode(tokenizer, text, special=False)  # the chat format brings its own special tokens
