"""`headsink prefill`: read a document once and save its compressed KV cache for later questions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import headsink
from headsink.cli.options import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    OtherWeights,
    Raw,
    Reconstruct,
    plan_path,
    standard_input,
)
from headsink.errors import HeadsinkError, printable
from headsink.utils.files import check_file, read_text
from headsink.utils.terminal import MEGABYTE, emit, out


@dataclass(frozen=True)
class PrefillOptions:
    """The options of `headsink prefill`."""

    plan_file: Annotated[Path, typer.Option("--plan", help="Plan file.", callback=plan_path)]
    model: Model = "smollm2"
    file: Annotated[Path | None, typer.Option(help="A file with the document; standard input if not given.")] = None
    out_file: Annotated[Path, typer.Option("--out", help="File for the compressed cache (safetensors).")] = Path(
        "prefix.safetensors"
    )
    reconstruct: Reconstruct = False
    raw: Raw = False
    other_weights: OtherWeights = False
    dtype: Dtype = None
    device: Device = None
    force: Force = False
    as_json: Json = False

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
    document = options.document()

    import torch

    from headsink.cache.cache import nbytes
    from headsink.generation import templates
    from headsink.runtime import prefill as runtime

    plan = headsink.Plan.load(options.plan_file)
    model, tokenizer = headsink.load(options.model, dtype=options.dtype, device=options.device)
    plan = plan.for_model(model) if options.other_weights else plan
    text, ids = templates.document_prompt(tokenizer, document, options.raw)
    start = time.perf_counter()
    cache = runtime.prefill(
        model, plan, torch.tensor([ids], device=model.device), exact=False, reconstruct=options.reconstruct
    )
    seconds = time.perf_counter() - start
    headsink.save_prefix(options.out_file, cache, torch.tensor([ids]), text, force=options.force)
    found = {"prompt_tokens": len(ids), "seconds": seconds, "kv_bytes": nbytes(cache), "file": str(options.out_file)}
    if options.as_json:
        emit(found | {"plan": str(options.plan_file)})
    else:
        out.print(document_read(found), markup=False, highlight=False)


def document_read(found: dict[str, Any]) -> str:
    """One line about a document: how long it is, what reading it took, and what is kept where."""
    kept = f"{found['kv_bytes'] / MEGABYTE:.1f} MB kept"
    return f"{found['prompt_tokens']} tokens read in {found['seconds']:.1f} s, {kept}: {printable(found['file'])}"
