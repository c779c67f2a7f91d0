"""`headsink ablate`: what a set of heads is worth, beside random sets of as many heads.

Goes in: a model, and heads by name or by a score of a census. Comes out: delta NLL and right answers with these heads limited to
a pattern and with random heads limited to it, as a table or as one JSON object.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import headsink
from headsink.census.options import check_census
from headsink.cli.options import Model, RunOptions, Seed
from headsink.errors import HeadsinkError
from headsink.evaluation.options import (
    ABLATION_CONTEXT,
    DRAWS,
    NULLS,
    check_null,
    check_quality,
    head_names,
    head_pattern,
)
from headsink.utils.terminal import emit, new_table, out

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from headsink.evaluation.ablation import Ablation


@dataclass(frozen=True)
class AblateOptions(RunOptions):
    """Options of `headsink ablate`."""

    model: Model = "smollm2"
    heads: Annotated[
        str | None,
        typer.Option(help="LAYER.HEAD from 0, separated by commas, as in 3.2,5.*; * is every head of the layer."),
    ] = None
    census: Annotated[
        Path | None, typer.Option(help="Instead: a census folder, whose --strongest heads are taken.")
    ] = None
    strongest: Annotated[int, typer.Option(min=1, help="How many heads of --census.")] = 10
    score: Annotated[str, typer.Option(help="The score of --census that ranks heads: sink, first, local, far, ...")] = (
        "sink"
    )
    pattern: Annotated[
        str,
        typer.Option(
            help="What the heads may see: SINK+WINDOW tokens; SINK+TOPk+WINDOW, as in 4+32k+256, adds each query's best keys; "
            "0+0 removes the heads; mean replaces their output by its mean."
        ),
    ] = "4+256"
    kv_heads: Annotated[
        bool, typer.Option("--kv-heads", help="Heads are KV heads: all query heads of their groups.")
    ] = False
    null: Annotated[
        str, typer.Option(help=f"Where random heads come from: {' or '.join(NULLS)} (as many from each layer, or any).")
    ] = "layers"
    draws: Annotated[int, typer.Option(min=0, help="Random sets of as many heads; p is at least 1 / (draws + 1).")] = (
        DRAWS
    )
    context: Annotated[int, typer.Option(help="Tokens of a text with the 256 that are scored.")] = ABLATION_CONTEXT
    documents: Annotated[int, typer.Option(min=1, help="Held-out texts of each kind: prose, code, maths, chat.")] = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        if (self.heads is None) == (self.census is None):
            raise HeadsinkError("heads: give --heads, such as 3.2,5.*, or --census FOLDER, one of the two")
        if self.heads is not None:
            head_names(self.heads)
        if self.census is not None:
            check_census(self.census)
            if self.kv_heads:
                raise HeadsinkError("kv-heads: the scores of --census are of query heads; give --heads")
        head_pattern(self.pattern)
        check_null(self.null, self.draws)
        check_quality([self.context], name="context")


def ablate(options: AblateOptions) -> None:
    """Measure what a set of heads is worth: what the model loses when only these heads see few keys, beside random heads.

    Takes minutes. Heads by name, or by a score of a census:

    headsink ablate smollm2 --heads 12.3,14.* --pattern 4+256

    headsink ablate smollm2 --census runs/a --strongest 27 --pattern 4+256
    """
    heads: str | list[tuple[int, int]] = options.heads or []
    model, tokenizer = headsink.load(options.model, dtype=options.dtype, device=options.device)
    if options.census is not None:
        heads = strongest_heads(options.census, model, options.score, options.strongest)
    found = headsink.ablate(
        model,
        tokenizer,
        heads,
        head_pattern(options.pattern),
        kv_heads=options.kv_heads,
        null=options.null,  # type: ignore[arg-type]
        draws=options.draws,
        context=options.context,
        documents=options.documents,
        seed=options.seed,
    )
    if options.as_json:
        emit(found.to_dict())
    else:
        print_ablation(out, found)


def strongest_heads(folder: Path, model: PreTrainedModel, score: str, count: int) -> list[tuple[int, int]]:
    """The heads of a census with the highest score. Raises for a census of another architecture."""
    from headsink.models.spec import describe

    census, shape = headsink.Census.load(folder), describe(model)
    measured = census.settings["model"]["architecture"], census.layers, census.settings["model"]["query_heads"]
    if measured != (shape.name, list(shape.attending), shape.query_heads):
        raise HeadsinkError(f"census: {folder} is of another model, {census.settings['model']['name']}")
    return census.strongest(score, count)


def print_ablation(console: Console, found: Ablation) -> None:
    from headsink.evaluation.head_sets import names

    table = new_table("Ablation, with 95 % intervals", "", "")
    table.show_header = False
    for name, text in found.summary().items():
        table.add_row(name, text)
    console.print(table)
    if found.random_sets:
        console.print("random: mean and range of the sets; difference: the heads minus the mean of the random sets.")
    console.print(f"heads: {names(found.cost.heads)}", highlight=False)
