"""What several bench commands share: their options, plans by name, and where a result goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headsink.bench.options import NODE_PACKAGE
from headsink.errors import HeadsinkError
from headsink.utils.files import write_text
from headsink.utils.terminal import write

if TYPE_CHECKING:
    from headsink.plan.plan import Plan


NewTokens = Annotated[int, typer.Option(min=3, help="Tokens to generate after a prompt.")]
Rounds = Annotated[int, typer.Option(min=1, help="Alternating rounds; the medians are to be quoted.")]
Batches = Annotated[str, typer.Option(help="How many texts at once, with commas.")]
OutFile = Annotated[Path | None, typer.Option("--out", help="Write the JSON here too.")]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(help=f"Measure llama.cpp too: a folder with node-llama-cpp in its node_modules ({NODE_PACKAGE})."),
]
Vllm = Annotated[
    Path | None,
    typer.Option(help="Measure vLLM too: the Python of an environment that has it; the one that runs this, if it has."),
]


def join_values(values: tuple[Any, ...]) -> str:
    """Values as one types them for an option: "0.5,0.25"."""
    return ",".join(map(str, values))


def named_plans(files: list[Path]) -> dict[str, Plan]:
    """Plans by the budgets that they were made for, or by their files where those do not tell them apart."""
    from headsink.plan.plan import Plan

    plans = [Plan.load(file) for file in files]
    budgets = [plan.calibration.get("budget") for plan in plans]
    named = all(isinstance(budget, int | float) for budget in budgets) and len(set(budgets)) == len(plans)
    names = [str(budget) if named else file.stem for budget, file in zip(budgets, files, strict=True)]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise HeadsinkError(f"plan: two files are called {repeated[0]}.json and were made for one budget; rename one")
    return dict(zip(names, plans, strict=True))


def deliver(result: dict[str, Any], summary: str, out_file: Path | None, force: bool, as_json: bool) -> None:
    """Write a result into the file, if there is one, and it or its summary to standard output."""
    text = json.dumps(result, indent=1) + "\n"
    if out_file is not None:
        write_text(out_file, text, force)
    write(text if as_json else summary + "\n")
