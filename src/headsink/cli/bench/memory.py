"""`headsink bench memory`: bytes of the KV cache and peak memory, under plans, against transformers and peers."""

from __future__ import annotations

from dataclasses import dataclass, field

from headsink.cli.bench.shared import Rounds
from headsink.cli.bench.speed import SpeedOptions, deliver_tables


@dataclass(frozen=True)
class MemoryOptions(SpeedOptions):
    """Options of `headsink bench speed` without the tokens to generate, on which memory hardly depends, and dtypes."""

    tokens: int = field(default=4, init=False)
    kv_dtypes: str = field(default="auto", init=False)
    rounds: Rounds = 2


def memory(options: MemoryOptions) -> None:
    """Bytes of the KV cache and peak memory of a process, under plans, against transformers and peers.

    Takes about 10 minutes on 2 cores for one plan and one text at a time.
    """
    comparison = options.comparison()

    from headsink.bench import memory as memory_bench

    deliver_tables(memory_bench.run(comparison), memory_bench.table, options)
