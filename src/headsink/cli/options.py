"""The options of the command line that mean the same everywhere, how their values are read, and what is checked at once.

The checks run while the command line is parsed, before a command imports torch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from headsink.errors import HeadsinkError
from headsink.evaluation.options import check_budget
from headsink.models.builtin import check_device, check_dtype, check_name, check_tokenizer
from headsink.plan.packaged import packaged_contexts
from headsink.runtime.options import check_kv_dtype
from headsink.utils.files import read_input
from headsink.utils.terminal import err


def known_model(name: str | None) -> str | None:
    """The name of a model that can be there, of a built-in one as it is listed."""
    if name is None:
        return None
    found = check_name(name)
    check_tokenizer(found)
    return found


def known_dtype(dtype: str | None) -> str | None:
    return dtype if dtype is None else check_dtype(dtype)


def known_device(device: str | None) -> str | None:
    return device if device is None else check_device(device)


def known_kv_dtype(kv_dtype: str) -> str:
    check_kv_dtype(kv_dtype, "kv-dtype")
    return kv_dtype


def plan_path(path: Path | None) -> Path | None:
    """A plan file that can be read and is JSON; its fields are checked when it is loaded."""
    if path is not None:
        _check_json(path)
    return path


def plan_paths(paths: list[Path] | None) -> list[Path] | None:
    for path in paths or ():
        _check_json(path)
    return paths


def _check_json(path: Path) -> None:
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe can be read once only
    try:
        json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise HeadsinkError(f"cannot read plan {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise HeadsinkError(f"{path}: not a plan: it is not JSON ({error})") from error


def readable(path: Path | None) -> Path | None:
    """A file that can be opened."""
    if path is not None:
        try:
            os.close(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
        except OSError as error:
            raise HeadsinkError(f"cannot read {path}: {error.strerror}") from error
        if path.is_dir():
            raise HeadsinkError(f"cannot read {path}: it is a folder, name a file")
    return path


MODEL_HELP = "smollm2 or gemma3-270m (built in), a folder, a .gguf file, or a Hugging Face id owner/name."
Model = Annotated[str, typer.Argument(help=MODEL_HELP, callback=known_model)]
PlanFiles = Annotated[
    list[Path] | None,
    typer.Option("--plan", help="Plan to measure, by the name of its file; may be repeated.", callback=plan_paths),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Plan file; without one, the full cache.", callback=plan_path),
]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the KV cache to keep, with a plan that comes with the package (built-in models): 0.5, 0.25, 0.125."
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Take the text as it is, without the model's chat format.")]
Reconstruct = Annotated[
    bool,
    typer.Option(
        "--reconstruct",
        help="Read the document twice (context reconstruction): the best quality, for many questions about it.",
    ),
]
KVDtype = Annotated[
    str,
    typer.Option(
        help="auto, the model's dtype; int8: keys and values in 8 bits, half of the bytes of bfloat16; k8v4: values in 4 "
        "bits, on CPUs. Without a plan too.",
        callback=known_kv_dtype,
    ),
]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy; above, sampling.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random choices: texts, shuffles, sampling.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.", callback=known_dtype),
]
OtherWeights = Annotated[
    bool,
    typer.Option(
        "--other-weights",
        help="Use a plan of other weights of the same shape, for a fine-tune; what it costs there is unknown.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.", callback=known_device)
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every command that runs a model."""

    dtype: Dtype = None
    device: Device = None
    as_json: Json = False


Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out even if headsink did not write it.")]


def check_other_weights(other_weights: bool, plans: Path | list[Path] | None) -> None:
    """Raise if `--other-weights` is given without a plan."""
    if other_weights and not plans:
        raise HeadsinkError("other-weights: it needs a plan that was made for other weights: --plan FILE")


def check_plan_choice(model: str, plan_file: Path | None, budget: float | None) -> None:
    """Raise if `--plan` and `--budget` are both given, or no plan of that budget comes with the package."""
    if budget is None:
        return
    if plan_file is not None:
        raise HeadsinkError("budget: give --plan FILE or --budget, one of the two")
    check_budget(budget)
    packaged_contexts(model, budget)  # raises if there is none


def names(text: str) -> list[str]:
    """Read "prose,code"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(name: str, text: str, kind: type[Any] = int) -> list[Any]:
    """Read "512,4096"; `name` is the option's, for the error."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        like = "whole numbers such as 512,4096" if kind is int else "numbers such as 0.1,0.25"
        raise HeadsinkError(f"{name}: {text!r} is not a list of {like}") from error


def batch_sizes(text: str) -> list[int]:
    """Read "1,4": how many texts at once."""
    found = numbers("batches", text)
    if wrong := [n for n in found if n < 1]:
        raise HeadsinkError(f"batches: {wrong[0]} texts at once are none; give numbers such as 1,4")
    return found


def context_range(text: str) -> int | tuple[int, int]:
    """Read "8192" or "2000-8000"."""
    try:
        numbers = [int(part) for part in text.split("-")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise HeadsinkError(f"context: {text!r} is neither a number of tokens nor a range such as 2000-8000")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def memory(text: str | None) -> dict[int | str, int | str] | None:
    """Read "0=20GB,cpu=30GB"."""
    if text is None:
        return None
    parts = [part.partition("=") for part in text.split(",")]
    if not all(device and size for device, _, size in parts):
        raise HeadsinkError(f"max-memory: {text!r} is not of the form cpu=30GB or 0=20GB,cpu=30GB")
    return {int(device) if device.strip().isdigit() else device.strip(): size.strip() for device, _, size in parts}


def standard_input(what: str) -> str:
    """All of standard input; a person at a terminal is told what to type."""
    if sys.stdin.isatty():
        err.print(f"type {what}", style="dim", highlight=False)
    return read_input()
