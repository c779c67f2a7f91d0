"""`headsink chat`: a conversation, one line of standard input a turn, whose KV cache stays from turn to turn."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from headsink.cli.loading import compile_step, load_with_plan
from headsink.cli.options import (
    Budget,
    KVDtype,
    Model,
    OtherWeights,
    PlanFile,
    RunOptions,
    Seed,
    Temperature,
    check_other_weights,
    check_plan_choice,
)
from headsink.cli.output import generated_json, summarize_generation
from headsink.plan.packaged import packaged_plan
from headsink.utils.terminal import emit, err, write


@dataclass(frozen=True)
class ChatOptions(RunOptions):
    """Options of `headsink chat`."""

    model: Model = "smollm2"
    plan_file: PlanFile = None
    budget: Budget = None
    kv_dtype: KVDtype = "auto"
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 500
    temperature: Temperature = 0.0
    other_weights: OtherWeights = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_other_weights(self.other_weights, self.plan_file)
        check_plan_choice(self.model, self.plan_file, self.budget)


def chat(options: ChatOptions) -> None:
    """Talk to the model, under a plan or without; one line a turn, an empty line or ctrl-D ends. Answers stream."""
    import torch

    from headsink.generation.chat import Conversation
    from headsink.models.spec import describe

    model, tokenizer, plan = load_with_plan(
        options.model, options.plan_file, options.other_weights, dtype=options.dtype, device=options.device
    )
    if options.budget is not None:  # of the longest conversation
        plan = packaged_plan(options.model, options.budget, describe(model).max_context)
    dtype: Any = options.kv_dtype
    compile_step(model, plan, dtype)
    torch.manual_seed(options.seed)
    how = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "kv_dtype": dtype}
    talk = Conversation(model, tokenizer, plan, **how)
    turns = []
    while line := _line():
        done = talk.ask(line, None if options.as_json else write)
        turns.append({"question": line, **generated_json(done)})
        if not options.as_json:
            write("\n")
            err.print(summarize_generation(done), style="dim", highlight=False)
    if options.as_json:
        emit({"turns": turns, "plan": str(options.plan_file) if options.plan_file else None, "budget": options.budget})


def _line() -> str:
    """The next line of standard input, after a prompt if a person types it; empty at the end."""
    if sys.stdin.isatty():
        err.print("[bold]> [/bold]", end="")
    return sys.stdin.readline().strip()
