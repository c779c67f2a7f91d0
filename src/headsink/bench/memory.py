"""KV-cache bytes and peak process memory, with and without plans, against transformers, llama.cpp and vLLM.

Every configuration runs in a separate process. It loads the model, resets the peak counter of the operating system (Linux only),
reads the prompts and generates a few tokens. The peak includes weights, cache and temporary memory. Cache bytes are those of the
storages behind its tensors; llama.cpp and vLLM report their own, in whole blocks.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import headsink
from headsink.bench.comparison import BASE, Cases, Comparison, format_kv, kv_token_bytes
from headsink.bench.peers.process import Failed, Process
from headsink.bench.speed import Configuration
from headsink.decoding.step import refusal
from headsink.plan.plan import Plan
from headsink.utils.progress import bar
from headsink.utils.statistics import spread


def run(options: Comparison) -> dict[str, Any]:
    """Run all measurements, in bytes."""
    cases = Cases(options, "bytes of the KV cache, and peak memory of a process")
    options, found, tokens = cases.options, cases.found, options.tokens
    full = Plan.full(cases.model)
    plan_of = {f"headsink, {name}": plan for name, plan in {"full": full, **options.plans}.items()}
    token_bytes = kv_token_bytes(cases.model)
    request = {"model_name": options.model_name, "dtype": found["dtype"], "device": found["device"]}
    del cases.model
    with tempfile.TemporaryDirectory() as folder:
        starts: dict[str, Callable[[int, int], Process]] = {BASE: partial(_start, BASE, request, None)}
        for number, (name, plan) in enumerate(plan_of.items()):
            file = plan.save(Path(folder) / f"{number}.json")
            starts[name] = partial(_start, name, request, file)
        for peer in cases.installed:
            starts[peer.name] = partial(peer.start, token_bytes=token_bytes)
        for context, batch, prompts in cases:
            measured: dict[str, list[dict[str, Any]]] = {name: [] for name in starts}
            with bar(f"{context} tokens x {batch}", options.rounds * len(starts), True) as shown:
                for _ in range(options.rounds):
                    for name in list(starts):
                        try:
                            with starts[name](context + tokens, batch) as process:
                                measured[name].append(_measure(process, prompts, tokens))
                        except Failed as error:
                            if name in plan_of or name == BASE:
                                raise
                            del starts[name]
                            cases.lose(name, error)
                        shown.advance(shown.task_ids[0])
            summaries = {name: _summary(measured[name], measured[BASE]) for name in starts}
            cases.add(context, batch, summaries, plan_of, table)
    return found


def table(found: dict[str, Any], context: int, batch: int) -> str:
    """Format the results of one context and batch size, a line for each configuration."""
    lines = [f"{context} tokens x {batch}, {found['model']}, {found['dtype']}"]
    for row in found["results"]:
        if (row["context"], row["batch"]) == (context, batch):
            bytes_ = row["peak_bytes"]
            peak = (
                "" if bytes_ is None else f"; peak {bytes_['median'] / 1e6:7.0f} MB, {row['peak_ratio']['median']:.3f}"
            )
            lines.append(f"  {row['way']:<24} {format_kv(row, 7)}{peak}")
    lines += [f"  {one['peer']}: {one['missing']}" for one in found["peers"] if "missing" in one]
    return "\n".join(lines)


def _start(name: str, request: dict[str, Any], plan: Path | None, longest: int, sequences: int) -> Process:
    """Start a worker process for headsink or transformers. `longest` and `sequences` match `Peer.start` and are unused."""
    arguments = json.dumps({**request, "name": name, "plan": None if plan is None else str(plan)})
    return Process(name, [sys.executable, "-m", __name__, arguments], {"OMP_NUM_THREADS": str(torch.get_num_threads())})


def _measure(process: Process, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    process.forget_peak()
    loaded = process.memory("VmRSS")
    done = process.ask(ids=prompts, tokens=tokens)
    peak = done.get("peak_bytes") or process.memory()
    return {"kv_bytes": done["kv_bytes"], "peak_bytes": peak, "loaded_bytes": loaded}


def _summary(own: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    kv, full = own[0]["kv_bytes"], base[0]["kv_bytes"]
    found: dict[str, Any] = {"kv_bytes": kv, "kv_ratio": kv and kv / full}
    for name in ("peak_bytes", "loaded_bytes"):
        found[name] = None if own[0][name] is None else spread([one[name] for one in own])
    if own[0]["peak_bytes"] is not None:
        pairs = zip(own, base, strict=True)
        found["peak_ratio"] = spread([one["peak_bytes"] / other["peak_bytes"] for one, other in pairs])
    return found


def _answer(name: str, model_name: str, dtype: str, device: str, plan: str | None) -> None:
    """Run the worker: load a model, report ready, and answer every line of standard input (see `Process`)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output goes to standard error
    model, _ = headsink.load(model_name, dtype=dtype, device=device)
    loaded = None if plan is None else Plan.load(plan)
    compiled = loaded is not None and refusal(model, loaded) is None
    configuration = Configuration(name, model, loaded, compiled)
    configuration.run([[1] * 16], 3)  # warm-up: kernels are compiled here
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        done = configuration.run(request["ids"], request["tokens"])
        if model.device.type == "cuda":
            done["peak_bytes"] = torch.cuda.max_memory_allocated(model.device)
        print(json.dumps(done), file=answers, flush=True)


if __name__ == "__main__":
    _answer(**json.loads(sys.argv[1]))
