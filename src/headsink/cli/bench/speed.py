"""`headsink bench speed`: time to the first token and per token, under plans, against transformers and peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headsink.bench.options import CONTEXTS, check_contexts
from headsink.cli.bench.shared import (
    Batches,
    LlamaCpp,
    NewTokens,
    OutFile,
    Rounds,
    Vllm,
    deliver,
    join_values,
    named_plans,
)
from headsink.cli.options import (
    Force,
    Model,
    OtherWeights,
    PlanFiles,
    RunOptions,
    Seed,
    batch_sizes,
    known_kv_dtype,
    numbers,
)
from headsink.utils.files import check_file
from headsink.utils.progress import console

if TYPE_CHECKING:
    from headsink.bench.comparison import Comparison


@dataclass(frozen=True)
class SpeedOptions(RunOptions):
    """Options of `headsink bench speed`."""

    model: Model = "smollm2"
    plan_files: PlanFiles = None
    contexts: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens of the prompts, with commas; of {join_values(CONTEXTS)} what the model has room for."
        ),
    ] = None
    batches: Batches = "1"
    kv_dtypes: Annotated[
        str, typer.Option("--kv-dtype", help="Of the caches under plans, with commas: auto,int8,k8v4.")
    ] = "auto"
    tokens: NewTokens = 33
    rounds: Rounds = 5
    llama_cpp: LlamaCpp = None
    vllm: Vllm = None
    other_weights: OtherWeights = False
    out_file: OutFile = None
    seed: Seed = 0
    force: Force = False

    def comparison(self) -> Comparison:
        """What `run` of bench/speed.py or bench/memory.py takes, read and checked."""
        if self.out_file is not None:
            check_file(self.out_file, self.force)
        contexts = None if self.contexts is None else numbers("contexts", self.contexts)
        batches = batch_sizes(self.batches)
        check_contexts(contexts or (), self.tokens)
        kv_dtypes: list[Any] = [known_kv_dtype(one) for one in self.kv_dtypes.split(",")]

        from headsink.bench.comparison import Comparison

        return Comparison(
            self.model,
            contexts=contexts,
            rounds=self.rounds,
            tokens=self.tokens,
            batches=batches,
            kv_dtypes=kv_dtypes,
            plans=named_plans(self.plan_files or []),
            other_weights=self.other_weights,
            llama_cpp=self.llama_cpp,
            vllm=self.vllm,
            seed=self.seed,
            dtype=self.dtype,
            device=self.device,
            report=lambda line: console.print(line, highlight=False),
        )


def speed(options: SpeedOptions) -> None:
    """Time to the first token, time per token and bytes of the KV cache, under plans, against transformers and peers.

    Do nothing else on the machine. Takes about 15 minutes on 2 cores for one plan and one text at a time.
    """
    comparison = options.comparison()

    from headsink.bench import speed as speed_bench

    deliver_tables(speed_bench.run(comparison), speed_bench.table, options)


def deliver_tables(
    result: dict[str, Any], table: Callable[[dict[str, Any], int, int], str], options: SpeedOptions
) -> None:
    """Deliver the result of a run with its table for each context and batch."""
    shown = dict.fromkeys((row["context"], row["batch"]) for row in result["results"])
    summary = "\n".join(table(result, *one) for one in shown)
    deliver(result, summary, options.out_file, options.force, options.as_json)
