"""`headsink plan`: calibrate which keys each KV head keeps, or draw the frontier of several budgets.

Goes in: a model, and if wanted a budget or a largest KL. Comes out: a plan file, or a folder with the plans of several budgets
and their chart; and what they keep and cost, on the terminal or as one JSON object.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import headsink
from headsink.calibration.method import POLICIES, Method
from headsink.cli.options import Force, Model, RunOptions, Seed, context_range, names, numbers
from headsink.cli.output import print_file
from headsink.data import corpus
from headsink.data.domains import KINDS, check_domains
from headsink.errors import HeadsinkError
from headsink.evaluation.options import (
    CONTINUATION,
    FRONTIER,
    FRONTIER_BUDGETS,
    check_budget,
    check_context,
    check_max_kl,
    check_quality,
)
from headsink.plan.summary import contexts
from headsink.utils.files import check_file, check_replaceable
from headsink.utils.terminal import MEGABYTE, emit, new_table, out, resumable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headsink.calibration.frontier import Frontier
    from headsink.plan.plan import Plan
    from headsink.plan.schema import Quality

MOST_PATTERNS = 10  # of a plan, that are listed one by one


@dataclass(frozen=True)
class PlanOptions(RunOptions):
    """Options of `headsink plan`."""

    model: Model = "smollm2"
    budget: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the KV cache to keep, above 0, at most 1; the smallest one without visible loss if not given."
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Instead of a budget: the largest KL of text, in nats per token, that is allowed; 0.02 is little."
        ),
    ] = None
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens of prompt and output that the plan is for, or a range as in 2000-8000; the model's maximum."
        ),
    ] = None
    policy: Annotated[str, typer.Option(help=f"How patterns are chosen: {', '.join(POLICIES)}.")] = "headsink"
    out_file: Annotated[Path, typer.Option("--out", help="Where the plan goes (JSON).")] = Path("plan.json")
    quality_contexts: Annotated[
        str | None,
        typer.Option("--quality", help="Lengths to measure the plan at, separated by commas; 'none' to skip."),
    ] = None
    frontier_folder: Annotated[
        Path | None,
        typer.Option("--frontier", help="Make plans of several budgets instead, with a chart of what they cost, here."),
    ] = None
    budgets: Annotated[str | None, typer.Option(help="The budgets of --frontier, separated by commas.")] = None
    domains: Annotated[str, typer.Option(help=f"Domains to calibrate on, separated by commas: {', '.join(KINDS)}.")] = (
        ",".join(corpus.DOMAINS)
    )
    no_top_k: Annotated[
        bool,
        typer.Option(
            "--no-top-k",
            help="Sinks and windows of several sizes only: for vLLM on GPUs or with prefix caching.",
        ),
    ] = False
    tensor_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="GPUs to serve on: heads at the same index of different GPUs keep equally many keys. Needs --no-top-k.",
        ),
    ] = 1
    positions: Annotated[
        str,
        typer.Option(help="absolute, or cache-relative for streaming generation, which needs --policy streaming-llm."),
    ] = "absolute"
    seed: Seed = 0
    force: Force = False

    def __post_init__(self) -> None:
        if self.budget is not None and self.max_kl is not None:
            raise HeadsinkError("max-kl: give --budget or --max-kl, one of the two, or neither")
        if self.frontier_folder is None and self.budgets is not None:
            raise HeadsinkError("budgets: they are those of --frontier FOLDER; for one plan give --budget")
        if self.frontier_folder is not None and (self.budget, self.max_kl, self.quality_contexts) != (None, None, None):
            raise HeadsinkError(
                "frontier: it takes --budgets, not --budget, --max-kl or --quality, which are for one plan"
            )
        if self.budget is not None:
            check_budget(self.budget)
        if self.max_kl is not None:
            check_max_kl(self.max_kl, "max-kl")

    def arguments(self) -> dict[str, Any]:
        """What calibration takes for a plan as for a frontier, read and checked. context: None is the model's maximum."""
        context = None if self.context is None else context_range(self.context)
        if context is not None:
            check_context(*(context if isinstance(context, tuple) else (context, context)))
        domains = check_domains(names(self.domains))
        return {"context": context, "domains": domains, "method": self._method(), "seed": self.seed}

    def _method(self) -> Method:
        if self.positions not in ("absolute", "cache-relative"):
            raise HeadsinkError(f"positions: {self.positions!r} is neither absolute nor cache-relative")
        if self.no_top_k and self.policy != "headsink":
            raise HeadsinkError(
                f"no-top-k: the policy {self.policy} has no top-k keys anyway; leave one of the two out"
            )
        return Method(
            policy=self.policy,  # type: ignore[arg-type]
            positions=self.positions,  # type: ignore[arg-type]
            ranks=self.tensor_parallel,
            top_k=not self.no_top_k,
        )

    def measured(self) -> list[int] | None:
        """The contexts to measure the plan at: none if so asked, None if it is left to calibration."""
        if self.quality_contexts is None or self.quality_contexts == "none":
            return None if self.quality_contexts is None else []
        lengths = numbers("quality", self.quality_contexts)
        check_quality(lengths, name="quality")
        return lengths

    def check_out(self) -> None:
        """Raise if what lies where results go may not be replaced."""
        if self.frontier_folder is not None:
            check_replaceable(self.frontier_folder, FRONTIER, self.force)
        else:
            check_file(self.out_file, self.force)

    def shares(self) -> list[float] | tuple[float, ...]:
        """The budgets of a frontier."""
        found = FRONTIER_BUDGETS if self.budgets is None else numbers("budgets", self.budgets, float)
        for share in found:
            check_budget(share)
        return found


def plan(options: PlanOptions) -> None:
    """Choose how many keys each KV head keeps, and measure what that costs. Takes minutes.

    Without --budget and --max-kl the smallest budget without visible loss is found. For models with few KV heads, which take
    longest, an interrupted run continues when it is started again with the same options.
    """
    arguments, measured = options.arguments(), options.measured()
    options.check_out()
    shares = options.shares()

    from headsink.models.spec import describe

    model, tokenizer = headsink.load(options.model, dtype=options.dtype, device=options.device)
    if arguments["context"] is None:
        arguments["context"] = describe(model).max_context
    if options.frontier_folder is not None:
        _draw_frontier(model, tokenizer, options.frontier_folder, options, budgets=shares, **arguments)
    else:
        _make_plan(model, tokenizer, options, quality_contexts=measured, **arguments)


def _make_plan(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: PlanOptions, **arguments: Any
) -> None:
    file = options.out_file
    checkpoint = file.with_name(f".{file.name}.partial")
    limits: dict[str, Any] = {"budget": options.budget, "max_kl": options.max_kl}
    with resumable(checkpoint):
        made = headsink.calibrate(model, tokenizer, **limits, checkpoint=checkpoint, **arguments)
    made.save(file, force=options.force)
    checkpoint.unlink(missing_ok=True)
    if options.as_json:
        emit(json.loads(made.to_json()) | {"file": str(file)})
    else:
        print_plan(out, made)
        print_file("Plan", file)


def _draw_frontier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, options: PlanOptions, **arguments: Any
) -> None:
    from headsink.calibration.frontier import frontier
    from headsink.report.frontier import write_frontier

    drawn = frontier(model, tokenizer, **arguments)
    write_frontier(drawn, folder, force=options.force)
    if options.as_json:
        emit(drawn.to_dict() | {"folder": str(folder)})
    else:
        print_frontier(out, drawn)
        print_file("Chart", folder / "frontier.html")


def print_plan(console: Console, made: Plan) -> None:
    lengths, counts = contexts(made), made.counts()
    if len(counts) > MOST_PATTERNS:
        console.print(_shares(made, lengths[0]))
    else:
        table = new_table("Patterns", "first + top_k + window", "KV heads")
        for name, count in counts.items():
            table.add_row(name, str(count))
        console.print(table)
    for context in lengths:
        console.print(f"Keeps {made.kv_budget(context):.1%} of the KV entries at {context} tokens.", highlight=False)
    if not made.quality:
        console.print("Quality was not measured.", highlight=False)
        return
    console.print(_qualities("tokens", {str(q.context): q for q in made.quality}))
    for q in made.quality:
        console.print(_bytes(made, q), highlight=False)
    console.print(f"Verified up to {made.verified} tokens.", highlight=False)


def _bytes(made: Plan, quality: Quality) -> str:
    """Why the cache's share of bytes is another one than the share of entries that a plan keeps at this length."""
    tokens, share = max(1, quality.context - CONTINUATION), quality.kv_bytes / quality.kv_bytes_full
    return (
        f"At {quality.context} tokens the document has {tokens}, and the rest is scored: the KV cache of the document has "
        f"{share:.1%} of the bytes and {made.kv_budget(tokens):.1%} of the entries. Bytes include bookkeeping and spare slots."
    )


def _shares(made: Plan, context: int) -> Table:
    """How many KV heads keep how much."""
    table = new_table(f"Kept at {context} tokens", "share of the keys", "KV heads")
    sizes = [head.pattern.size(context) / context for layer in made.layers for head in layer or ()]
    above = 1.0
    table.add_row("all", str(sum(size >= 1 for size in sizes)))
    for below in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 0.0):
        if count := sum(below <= size < above for size in sizes):
            table.add_row(f"{below:.1%} to {above:.1%}" if below else f"under {above:.1%}", str(count))
        above = below
    return table


def print_frontier(console: Console, drawn: Frontier) -> None:
    console.print(_qualities("budget", {f"{p.calibration['budget']:.1%}": p.quality[-1] for p in drawn.plans}))
    console.print(drawn.advice(), highlight=False)


def _qualities(first: str, rows: dict[str, Quality]) -> Table:
    """Print quality against the full cache, one row per context or plan."""
    columns = (first, "KL, nats", "same top token", "delta NLL", "retrieval", "full cache", "KV cache, MB")
    table = new_table("Against the full cache on held-out text (95 % interval)", *columns)
    for name, q in rows.items():
        kl, top1, change = q.kl_interval, q.top1_interval, q.nll_change_interval
        table.add_row(
            name,
            f"{q.kl:.4f} ({kl[0]:.4f} to {kl[1]:.4f})",
            f"{q.top1:.1%} ({top1[0]:.1%} to {top1[1]:.1%})",
            f"{q.nll_change:+.4f} ({change[0]:+.4f} to {change[1]:+.4f})",
            f"{q.right_plan} of {q.asked}",
            f"{q.right_full} of {q.asked}",
            f"{q.kv_bytes / MEGABYTE:.1f} of {q.kv_bytes_full / MEGABYTE:.1f}",
        )
    return table
