"""`headsink serve`: vLLM's OpenAI server, with a plan.

What can go wrong because of the input is found here, before vLLM starts: that is one line, and not the end of a long log. Then
this process becomes the server; every option that is not ours is handed on to it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from headsink.cli.options import Model, plan_path
from headsink.serving.vllm.launch import command, environment
from headsink.utils.terminal import err

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


ServedPlan = Annotated[
    Path, typer.Option("--plan", help="The plan (JSON), as headsink plan writes it.", callback=plan_path)
]


@dataclass(frozen=True)
class ServeOptions:
    """Options of `headsink serve`. vLLM's own options are in the arguments of the context."""

    context: typer.Context
    model: Model
    plan_file: ServedPlan
    prefill: Annotated[
        str,
        typer.Option(
            help="dense reads a prompt in full attention, then evicts; sparse evicts while it reads: fewer blocks, less quality."
        ),
    ] = "dense"
    prefixes: Annotated[
        list[Path] | None,
        typer.Option(
            "--prefix",
            help="A document that headsink prefill read under this plan: prompts that begin with it start after it. Repeatable.",
        ),
    ] = None


def serve(options: ServeOptions) -> None:
    """Serve a model under a plan by vLLM's OpenAI server. Options not listed here are vLLM's: --port, --max-model-len, ...

    The memory of evicted keys is free for other requests. vLLM works in whole blocks, so heads keep a little more than the plan
    says. At startup the server prints how many blocks a sequence takes; /metrics has what running ones save. Plans with top-k
    keys run on a CPU, without prefix caching but from prefixes. Make others with headsink plan --no-top-k; they are always read
    sparsely. Several GPUs: --tensor-parallel-size N.
    """
    given = options.context.args
    arguments = command(options.model, options.plan_file, given, options.prefill, options.prefixes or ())
    err.print(f"starting vLLM: {' '.join(given) or 'its own defaults'}", markup=False, highlight=False)
    os.execve(sys.executable, [sys.executable, *arguments], environment(given))
