"""`headsink bench quality`: what plans cost on tasks (quality.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headsink.bench.tasks.tasks import TASKS
from headsink.bench.tasks.tasks import task as find_task
from headsink.cli.options import Device, Dtype, Force, Json, Model, OtherWeights, PlanFiles, Seed, names, numbers
from headsink.errors import HeadsinkError
from headsink.evaluation.options import check_budget
from headsink.utils.files import check_file, remove, write_text
from headsink.utils.progress import console
from headsink.utils.terminal import resumable, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headsink.plan.plan import Plan


BUDGETS = "0.5,0.25,0.125"


def quality(
    model: Model = "smollm2",
    tasks: Annotated[str, typer.Option(help=f"Separated by commas, of {', '.join(TASKS)}.")] = ",".join(TASKS),
    plan_files: PlanFiles = None,
    budgets: Annotated[
        str | None,
        typer.Option(help=f"Instead: plans of these budgets, made first and kept beside --out; {BUDGETS}."),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 30,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together; plans are made for it.")] = 2000,
    out_file: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = Path("quality.json"),
    other_weights: OtherWeights = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """What plans cost on tasks: scores, and agreement with the model itself, on prompts as long as the plans are made for.

    Takes hours for all tasks on 2 cores. Stopped, it goes on where it was when it is started again with the same options.
    """
    if plan_files and budgets is not None:
        raise HeadsinkError("budgets: give --plan or --budgets, one of the two")
    check_file(out_file, force)
    chosen = [find_task(name.strip()).name for name in names(tasks)]
    stems = [file.stem for file in plan_files or ()]
    if len(set(stems)) < len(stems):
        raise HeadsinkError("plan: two files have the same name; results go by it, so give them names of their own")
    shares = [] if plan_files else numbers("budgets", budgets or BUDGETS, float)
    for share in shares:
        check_budget(share)
    if other_weights and not plan_files:
        raise HeadsinkError("other-weights: it needs a plan that was made for other weights: --plan FILE")

    import headsink
    from headsink.bench.heading import heading
    from headsink.bench.quality import run, table
    from headsink.models.devices import dtype_name
    from headsink.plan.plan import Plan

    plans = {file.stem: Plan.load(file) for file in plan_files or ()}
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    if other_weights:
        plans = {name: plan.for_model(loaded) for name, plan in plans.items()}
    folder, checkpoint = out_file.with_name(f"{out_file.stem}-plans"), out_file.with_name(f".{out_file.name}.partial")
    with resumable(checkpoint, folder):
        plans |= _made(loaded, tokenizer, shares, context, seed, folder)
        results = []
        for name in chosen:
            kept = checkpoint / f"{name}.jsonl"
            found = run(loaded, tokenizer, name, plans, items=items, context=context, seed=seed, checkpoint=kept)
            results.append(found)
            console.print(table(found), highlight=False)
    result = heading("scores of tasks under plans, and agreement with the model itself") | {
        "command": "headsink " + " ".join(sys.argv[1:]),
        "model": model,
        "dtype": dtype_name(loaded.dtype),
        "device": str(loaded.device),
        "plans": {
            way: {"kept": round(plan.kept(context), 4), "patterns": plan.counts()} for way, plan in plans.items()
        },
        "results": results,
    }
    text = json.dumps(result, indent=1) + "\n"
    write_text(out_file, text, force)
    remove(checkpoint, [f"{name}.jsonl" for name in chosen])
    write(text if as_json else "\n".join(map(table, results)) + f"\n\nResults: {out_file}\n")


def _made(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budgets: list[float],
    context: int,
    seed: int,
    folder: Path,
) -> dict[str, Plan]:
    """A plan for each budget, from the folder if it was made there with the same settings."""
    from headsink.calibration.calibrate import Calibration
    from headsink.models.devices import dtype_name
    from headsink.plan.plan import Plan

    checkpoint, calibration, plans = folder / "calibration.partial", None, {}
    for budget in budgets:
        file = folder / f"{context}-{budget:g}-{seed}.json"
        wanted = {"budget": budget, "context": [context, context], "seed": seed, "dtype": dtype_name(model.dtype)}
        plan = Plan.load(file) if file.is_file() else None
        if plan is None or any(plan.calibration.get(key) != value for key, value in wanted.items()):
            if calibration is None:  # documents are read once for all budgets
                calibration = Calibration(model, tokenizer, context=context, seed=seed, checkpoint=checkpoint)
            plan = calibration.plan(budget)
            plan.save(file)
            checkpoint.unlink(missing_ok=True)
        plans[f"{budget:g}"] = plan
    return plans
