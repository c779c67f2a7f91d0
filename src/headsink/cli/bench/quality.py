"""`headsink bench quality`: what plans cost on tasks (bench/quality.py), or on a long-context suite (bench/longcontext)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import headsink
from headsink.bench.tasks.suites import SUITES, Suite, check_lengths, check_tasks, find_suite
from headsink.bench.tasks.tasks import TASKS
from headsink.bench.tasks.tasks import task as find_task
from headsink.cli.bench.longcontext import measure_suite
from headsink.cli.options import (
    Force,
    KVDtype,
    Model,
    OtherWeights,
    PlanFiles,
    Raw,
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
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headsink.plan.plan import Plan


BUDGETS = "0.5,0.25,0.125"
SUITE_BUDGETS = f"{BUDGETS},0.0625"
PRESSES = "KVzip,KVzap-linear,ExpectedAttention,SnapKV"


@dataclass(frozen=True)
class QualityOptions(RunOptions):
    """Options of `headsink bench quality`."""

    model: Model = "smollm2"
    suite: Annotated[
        str | None,
        typer.Option(help=f"Run a long-context suite with the lm-evaluation-harness instead: {', '.join(SUITES)}."),
    ] = None
    tasks: Annotated[
        str | None, typer.Option(help=f"Separated by commas, of {', '.join(TASKS)}, or of the suite; all of them.")
    ] = None
    plan_files: PlanFiles = None
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Instead: plans of these budgets, packaged or calibrated first, kept next to --out. "
            f"{BUDGETS}; with a suite {SUITE_BUDGETS}."
        ),
    ] = None
    kv_dtype: KVDtype = "auto"
    items: Annotated[
        int, typer.Option(min=1, help="Prompts of each task; needles for each depth, documents of multiturn.")
    ] = 30
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together; plans are made for it.")] = 2000
    lengths: Annotated[
        str | None, typer.Option(help="Of a suite instead of --context, separated by commas, such as 4096,8192.")
    ] = None
    raw: Raw = False
    kvpress: Annotated[
        Path | None,
        typer.Option(help="Measure presses of kvpress on the suite too: the Python of an environment that has it."),
    ] = None
    presses: Annotated[str, typer.Option(help="Presses of kvpress, separated by commas.")] = PRESSES
    out_file: Annotated[Path, typer.Option("--out", help="Where the JSON goes.")] = Path("quality.json")
    other_weights: OtherWeights = False
    seed: Seed = 0
    force: Force = False

    def __post_init__(self) -> None:
        if self.plan_files and self.budgets is not None:
            raise HeadsinkError("budgets: give --plan or --budgets, one of the two")
        for name in ("lengths", "raw", "kvpress"):
            if self.suite is None and getattr(self, name):
                raise HeadsinkError(f"{name}: it is for a suite; give --suite, one of {', '.join(SUITES)}")
        if unknown := set(names(self.presses)) - set(names(PRESSES)):
            raise HeadsinkError(f"presses: {min(unknown)!r} is unknown; of {PRESSES}")
        check_file(self.out_file, self.force)

    def chosen_tasks(self) -> list[str]:
        """The names of the tasks."""
        return [find_task(name).name for name in (list(TASKS) if self.tasks is None else names(self.tasks))]

    def chosen_suite(self) -> tuple[Suite, list[str], list[int]]:
        """The suite, its tasks and lengths. Raises HeadsinkError for unknown ones and for packages that are not installed."""
        suite = find_suite(self.suite or "")
        tasks = list(suite.tasks) if self.tasks is None else names(self.tasks)
        lengths = list(suite.lengths) if self.lengths is None else numbers("lengths", self.lengths)
        check_lengths(lengths)
        check_tasks(suite, tasks)
        return suite, tasks, lengths

    def shares(self) -> list[float]:
        """The budgets of the plans to make: none if there are plans, which must have different names."""
        stems = [file.stem for file in self.plan_files or ()]
        if len(set(stems)) < len(stems):
            raise HeadsinkError("plan: two files have the same name; results go by it, so give them names of their own")
        found = (
            []
            if self.plan_files
            else numbers("budgets", self.budgets or (SUITE_BUDGETS if self.suite else BUDGETS), float)
        )
        for share in found:
            check_budget(share)
        check_other_weights(self.other_weights, self.plan_files)
        return found

    @property
    def plan_folder(self) -> Path:
        """Where plans of budgets are kept."""
        return self.out_file.with_name(f"{self.out_file.stem}-plans")

    def made_plans(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shares: list[float], context: int
    ) -> dict[str, Plan]:
        """The plans of budgets for `context` tokens, packaged or calibrated, by their names in results."""
        from headsink.bench.plans import plans_of_budgets

        files = {share: self.plan_folder / f"{context}-{share:g}-{self.seed}.json" for share in shares}
        checkpoint = self.plan_folder / "calibration.partial"
        settings: dict[str, Any] = {"context": context, "seed": self.seed, "checkpoint": checkpoint}
        made = plans_of_budgets(self.model, model, tokenizer, files, **settings)
        return {f"{share:g}": plan for share, plan in made.items()}

    def describe(self, model: PreTrainedModel, plans: dict[str, Plan], context: int) -> dict[str, Any]:
        """What results begin with: the command, the machine, the model and the plans, with their budgets at `context` tokens."""
        from headsink.bench.heading import provenance
        from headsink.models.devices import dtype_name

        return provenance("scores of tasks under plans, and agreement with the full cache") | {
            "model": self.model,
            "dtype": dtype_name(model.dtype),
            "device": str(model.device),
            "kv_dtype": self.kv_dtype,
            "plans": {
                way: {"kept": round(plan.kv_budget(context), 4), "patterns": plan.counts()}
                for way, plan in plans.items()
            },
        }


def quality(options: QualityOptions) -> None:
    """What plans cost on tasks: scores, and agreement with the full cache, on prompts as long as the plans are made for.

    Questions about documents are in --suite longbench, retrieval in --suite needles and --suite ruler.

    Takes hours for all tasks on 2 cores. An interrupted run continues when it is started again with the same options.
    """
    shares = options.shares()
    if options.suite is not None:
        suite, tasks, lengths = options.chosen_suite()

        measure_suite(options, suite, tasks, lengths, shares)
        return
    tasks = options.chosen_tasks()

    from headsink.bench.quality import run, table

    plans = {file.stem: headsink.Plan.load(file) for file in options.plan_files or ()}
    model, tokenizer = headsink.load(options.model, dtype=options.dtype, device=options.device)
    if options.other_weights:
        plans = {name: plan.for_model(model) for name, plan in plans.items()}
    file, context, seed = options.out_file, options.context, options.seed
    checkpoint = file.with_name(f".{file.name}.partial")
    with resumable(checkpoint, options.plan_folder):
        plans |= options.made_plans(model, tokenizer, shares, context)
        results = []
        for name in tasks:
            kept = checkpoint / f"{name}.jsonl"
            given: dict[str, Any] = {"context": context, "seed": seed, "kv_dtype": options.kv_dtype}
            found = run(model, tokenizer, name, plans, items=options.items, checkpoint=kept, **given)
            results.append(found)
            console.print(table(found), highlight=False)
    result = options.describe(model, plans, options.context) | {"results": results}
    text = json.dumps(result, indent=1) + "\n"
    write_text(file, text, options.force)
    remove(checkpoint, [f"{name}.jsonl" for name in tasks])
    write(text if options.as_json else "\n".join(map(table, results)) + f"\n\nResults: {file}\n")
