"""`headsink bench quality`: what plans cost on tasks (bench/quality.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import headsink
from headsink.bench.tasks.tasks import TASKS
from headsink.bench.tasks.tasks import task as find_task
from headsink.cli.options import (
    Force,
    KVDtype,
    Model,
    OtherWeights,
    PlanFiles,
    RunOptions,
    Seed,
    check_other_weights,
    names,
    numbers,
)
from headsink.errors import HeadsinkError
from headsink.evaluation.options import check_budget
from headsink.utils.files import check_file, remove, write_text
from headsink.utils.progress import console
from headsink.utils.terminal import resumable, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headsink.plan.plan import Plan


BUDGETS = "0.5,0.25,0.125"


@dataclass(frozen=True)
class QualityOptions(RunOptions):
    """Options of `headsink bench quality`."""

    model: Model = "smollm2"
    tasks: Annotated[str, typer.Option(help=f"Separated by commas, of {', '.join(TASKS)}.")] = ",".join(TASKS)
    plan_files: PlanFiles = None
    budgets: Annotated[
        str | None,
        typer.Option(help=f"Instead: plans of these budgets, made first and kept next to --out; {BUDGETS}."),
    ] = None
    kv_dtype: KVDtype = "auto"
    items: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 30
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together; plans are made for it.")] = 2000
    out_file: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = Path("quality.json")
    other_weights: OtherWeights = False
    seed: Seed = 0
    force: Force = False

    def __post_init__(self) -> None:
        if self.plan_files and self.budgets is not None:
            raise HeadsinkError("budgets: give --plan or --budgets, one of the two")
        check_file(self.out_file, self.force)

    def chosen_tasks(self) -> list[str]:
        """The names of the tasks."""
        return [find_task(name.strip()).name for name in names(self.tasks)]

    def shares(self) -> list[float]:
        """The budgets of the plans to make: none if there are plans, which must have different names."""
        stems = [file.stem for file in self.plan_files or ()]
        if len(set(stems)) < len(stems):
            raise HeadsinkError("plan: two files have the same name; results go by it, so give them names of their own")
        found = [] if self.plan_files else numbers("budgets", self.budgets or BUDGETS, float)
        for share in found:
            check_budget(share)
        check_other_weights(self.other_weights, self.plan_files)
        return found


def quality(options: QualityOptions) -> None:
    """What plans cost on tasks: scores, and agreement with the full cache, on prompts as long as the plans are made for.

    Takes hours for all tasks on 2 cores. An interrupted run continues when it is started again with the same options.
    """
    tasks, shares = options.chosen_tasks(), options.shares()

    from headsink.bench.plans import calibrate_plans
    from headsink.bench.quality import run, table

    plans = {file.stem: headsink.Plan.load(file) for file in options.plan_files or ()}
    model, tokenizer = headsink.load(options.model, dtype=options.dtype, device=options.device)
    if options.other_weights:
        plans = {name: plan.for_model(model) for name, plan in plans.items()}
    file, context, seed = options.out_file, options.context, options.seed
    folder, checkpoint = file.with_name(f"{file.stem}-plans"), file.with_name(f".{file.name}.partial")
    with resumable(checkpoint, folder):
        files = {share: folder / f"{context}-{share:g}-{seed}.json" for share in shares}
        partial = folder / "calibration.partial"
        made = calibrate_plans(model, tokenizer, files, context=context, seed=seed, checkpoint=partial)
        plans |= {f"{share:g}": plan for share, plan in made.items()}
        results = []
        for name in tasks:
            kept = checkpoint / f"{name}.jsonl"
            given: dict[str, Any] = {"context": context, "seed": seed, "kv_dtype": options.kv_dtype}
            found = run(model, tokenizer, name, plans, items=options.items, checkpoint=kept, **given)
            results.append(found)
            console.print(table(found), highlight=False)
    result = _described(model, options, plans) | {"results": results}
    text = json.dumps(result, indent=1) + "\n"
    write_text(file, text, options.force)
    remove(checkpoint, [f"{name}.jsonl" for name in tasks])
    write(text if options.as_json else "\n".join(map(table, results)) + f"\n\nResults: {file}\n")


def _described(model: PreTrainedModel, options: QualityOptions, plans: dict[str, Plan]) -> dict[str, Any]:
    """What results begin with: the command, the machine, the model and the plans."""
    from headsink.bench.heading import provenance
    from headsink.models.devices import dtype_name

    return provenance("scores of tasks under plans, and agreement with the full cache") | {
        "model": options.model,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
        "kv_dtype": options.kv_dtype,
        "plans": {
            way: {"kept": round(plan.kv_budget(options.context), 4), "patterns": plan.counts()}
            for way, plan in plans.items()
        },
    }
