"""`headsink prefill`: read a document once and save its compressed KV cache for later questions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import headsink
from headsink.cli.loading import load_with_plan
from headsink.cli.options import (
    Budget,
    Force,
    KVDtype,
    Model,
    OtherWeights,
    Raw,
    Reconstruct,
    RunOptions,
    check_other_weights,
    check_plan_choice,
    plan_path,
    standard_input,
)
from headsink.errors import HeadsinkError, printable
from headsink.plan.packaged import packaged_plan
from headsink.utils.files import check_file, read_text
from headsink.utils.terminal import MEGABYTE, emit, out


@dataclass(frozen=True)
class PrefillOptions(RunOptions):
    """The options of `headsink prefill`."""

    model: Model = "smollm2"
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan file.", callback=plan_path)] = None
    budget: Budget = None
    file: Annotated[Path | None, typer.Option(help="A file with the document; standard input if not given.")] = None
    out_file: Annotated[Path, typer.Option("--out", help="File for the compressed cache (safetensors).")] = Path(
        "prefix.safetensors"
    )
    reconstruct: Reconstruct = False
    kv_dtype: KVDtype = "auto"
    raw: Raw = False
    other_weights: OtherWeights = False
    force: Force = False

    def __post_init__(self) -> None:
        check_plan_choice(self.model, self.plan_file, self.budget)
        if self.plan_file is None and self.budget is None:
            raise HeadsinkError("plan: give --plan FILE, or --budget for a plan that comes with the package")
        check_other_weights(self.other_weights, self.plan_file)

    def document(self) -> str:
        """The text of the file, or of standard input."""
        found = read_text(self.file) if self.file else standard_input("the document: it ends with ctrl-D")
        if not found.strip():
            raise HeadsinkError("file: it is empty; give --file FILE, or text on standard input")
        return found


def prefill(options: PrefillOptions) -> None:
    """Read a document once, evict as the plan says, and save the KV cache for any number of later questions.

    Then: headsink generate --prefix prefix.safetensors --prompt "What does it say about X?"
    """
    check_file(options.out_file, options.force)
    given = options.document()

    import torch

    from headsink.cache.cache import nbytes
    from headsink.generation import templates
    from headsink.models.distributed import input_device
    from headsink.runtime import prefill as runtime

    model, tokenizer, plan = load_with_plan(
        options.model, options.plan_file, options.other_weights, dtype=options.dtype, device=options.device
    )
    text, ids = templates.document_prompt(tokenizer, given, options.raw)
    if options.budget is not None:
        plan = packaged_plan(options.model, options.budget, len(ids))
    document = torch.tensor([ids], device=input_device(model))
    start = time.perf_counter()
    dtype: Any = options.kv_dtype
    cache = runtime.empty_cache(model, plan, exact=False, kv_dtype=dtype)
    runtime.prefill(model, plan, document, cache=cache, reconstruct=options.reconstruct)
    seconds = time.perf_counter() - start
    headsink.save_prefix(options.out_file, cache, torch.tensor([ids]), text, force=options.force)
    found = {"prompt_tokens": len(ids), "seconds": seconds, "kv_bytes": nbytes(cache), "file": str(options.out_file)}
    if options.as_json:
        emit(found | {"plan": str(options.plan_file) if options.plan_file else None, "budget": options.budget})
    else:
        out.print(document_read(found), markup=False, highlight=False)


def document_read(found: dict[str, Any]) -> str:
    """One line about a document: how long it is, what reading it took, and what is kept where."""
    kept = f"{found['kv_bytes'] / MEGABYTE:.1f} MB kept"
    return f"{found['prompt_tokens']} tokens read in {found['seconds']:.1f} s, {kept}: {printable(found['file'])}"
