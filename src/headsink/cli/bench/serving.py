"""`headsink bench serving`: throughput and latency of vLLM, stock and under a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from headsink.bench.options import SERVERS
from headsink.cli.bench.shared import OutFile, Rounds, deliver
from headsink.cli.options import Force, Json, Model, names, numbers
from headsink.cli.serve import ServedPlan
from headsink.errors import HeadsinkError
from headsink.utils.files import check_file


@dataclass(frozen=True)
class ServingOptions:
    """Options of `headsink bench serving`. vLLM's own options are in the arguments of the context."""

    context: typer.Context
    model: Model
    plan_file: ServedPlan
    clients: Annotated[str, typer.Option(help="Numbers of requests at once, with commas.")] = "1,8,32"
    requests: Annotated[int, typer.Option(min=1, help="Requests of each client.")] = 2
    prompt: Annotated[int, typer.Option(min=320, help="Tokens of a prompt.")] = 2048
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each request.")] = 200
    rounds: Rounds = 2
    ways: Annotated[str, typer.Option(help="stock vLLM, and the plan with dense or sparse prefill; with commas.")] = (
        "stock,dense"
    )
    kv_gib: Annotated[int, typer.Option(min=1, help="Size of the KV cache of every server, GiB.")] = 1
    out_file: OutFile = None
    force: Force = False
    as_json: Json = False


def serving(options: ServingOptions) -> None:
    """Throughput, TTFT and TPOT of vLLM, stock and under a plan, with KV caches of equal size.

    Starts the servers in turn and sends the same requests to each with vLLM's bench client: held-out documents with a question
    about a needle, whose answers are checked. Other options are vLLM's, for all servers: --dtype, --max-num-batched-tokens, ...
    Do nothing else on the machine. Takes about half an hour for the built-in model on 2 cores.
    """
    clients, ways = numbers("clients", options.clients), names(options.ways)
    if min(clients) < 1:
        raise HeadsinkError(f"clients: {min(clients)} clients send nothing; give numbers such as 1,8,32")
    if unknown := [way for way in ways if way not in SERVERS] or [""] * (not ways):
        raise HeadsinkError(f"ways: {unknown[0]!r} is not one of {', '.join(SERVERS)}")
    if options.out_file is not None:
        check_file(options.out_file, options.force)

    from headsink.bench import serving as serving_bench

    numbers_of = {name: getattr(options, name) for name in ("requests", "prompt", "tokens", "rounds", "kv_gib")}
    vllm_options = tuple(options.context.args)
    load = serving_bench.Load(
        options.model, options.plan_file, tuple(clients), ways=tuple(ways), options=vllm_options, **numbers_of
    )
    result = serving_bench.run(load)
    deliver(result, serving_bench.table(result), options.out_file, options.force, options.as_json)
