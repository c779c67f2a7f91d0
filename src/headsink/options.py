"""The options of the command line that mean the same everywhere, and how their values are read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from headsink.errors import HeadsinkError

MODEL_HELP = "smollm2 or gemma3-270m (built in), a folder, a .gguf file, or a Hugging Face id owner/name."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices: texts, shuffles, sampling.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out even if headsink did not write it.")]


def numbers(name: str, text: str, kind: type[Any] = int) -> list[Any]:
    """Read "512,4096"; `name` is the option's, for the error."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        like = "whole numbers such as 512,4096" if kind is int else "numbers such as 0.1,0.25"
        raise HeadsinkError(f"{name}: {text!r} is not a list of {like}") from error


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
