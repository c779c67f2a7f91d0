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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import headsink
from headsink.bench.heading import machine, versions
from headsink.bench.options import check_contexts, contexts_for
from headsink.bench.peers import process as peers
from headsink.bench.peers.process import Failed, Process
from headsink.bench.speed import BASE, Configuration, heldout_prompts, kv_token_bytes
from headsink.generation.decode import refusal
from headsink.models.devices import dtype_name
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.utils.progress import bar
from headsink.utils.statistics import spread


def run(
    model_name: str,
    *,
    contexts: Sequence[int] | None,
    rounds: int,
    tokens: int = 4,
    batches: Sequence[int] = (1,),
    plans: Mapping[str, Plan] | None = None,
    other_weights: bool = False,
    llama_cpp: Path | None = None,
    vllm: Path | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run all measurements, in bytes.

    other_weights: accept plans calibrated with other weights of the same shape. `report` is called with the table of each
    finished context and batch size.
    """
    peers.check(llama_cpp, vllm)
    model, tokenizer = headsink.load(model_name, dtype=dtype, device=device)
    if other_weights:
        plans = {name: plan.for_model(model) for name, plan in (plans or {}).items()}
    most = describe(model).max_context
    contexts = contexts_for(most, tokens) if contexts is None else contexts
    check_contexts(contexts, tokens, most)
    installed, missing = peers.find(model_name, model, llama_cpp, vllm)
    found: dict[str, Any] = {
        "what": "bytes of the KV cache, and peak memory of a process",
        "command": "headsink " + " ".join(sys.argv[1:]),
        "versions": versions(),
        "machine": machine(),
        "model": model_name,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
        "plans": {name: plan.counts() for name, plan in (plans or {}).items()},
        "peers": [{"peer": peer.name, "version": peer.version} for peer in installed]
        + [peer.to_dict() for peer in missing],
        "tokens": tokens,
        "rounds": rounds,
        "results": [],
    }
    plan_of = {f"headsink, {name}": plan for name, plan in {"full": Plan.full(model), **(plans or {})}.items()}
    token_bytes = kv_token_bytes(model)
    request = {"model_name": model_name, "dtype": dtype_name(model.dtype), "device": str(model.device)}
    del model
    with tempfile.TemporaryDirectory() as folder:
        starts: dict[str, Callable[[int, int], Process]] = {BASE: partial(_start, BASE, request, None)}
        for number, (name, plan) in enumerate(plan_of.items()):
            file = plan.save(Path(folder) / f"{number}.json")
            starts[name] = partial(_start, name, request, file)
        for peer in installed:
            starts[peer.name] = partial(peer.start, token_bytes=token_bytes)
        for context in contexts:
            for batch in batches:
                prompts = heldout_prompts(tokenizer, context, batch, seed)
                measured: dict[str, list[dict[str, Any]]] = {name: [] for name in starts}
                with bar(f"{context} tokens x {batch}", rounds * len(starts), True) as shown:
                    for _ in range(rounds):
                        for name in list(starts):
                            try:
                                with starts[name](context + tokens, batch) as process:
                                    measured[name].append(_measure(process, prompts, tokens))
                            except Failed as error:
                                if name in plan_of or name == BASE:
                                    raise
                                del starts[name]
                                found["peers"] += [{"peer": name, "missing": str(error)}]
                            shown.advance(shown.task_ids[0])
                for name in starts:
                    row: dict[str, Any] = {"context": context, "batch": batch, "way": name}
                    row |= {"kept": plan_of[name].kv_budget(context)} if name in plan_of else {}
                    found["results"].append(row | _summary(measured[name], measured[BASE]))
                if report is not None:
                    report(table(found, context, batch))
    return found


def table(found: dict[str, Any], context: int, batch: int) -> str:
    """Format the results of one context and batch size, a line for each configuration."""
    lines = [f"{context} tokens x {batch}, {found['model']}, {found['dtype']}"]
    for row in found["results"]:
        if (row["context"], row["batch"]) == (context, batch):
            kv = (
                "KV unknown"
                if row["kv_bytes"] is None
                else f"KV {row['kv_bytes'] / 1e6:7.1f} MB, {row['kv_ratio']:.3f}"
            )
            bytes_ = row["peak_bytes"]
            peak = (
                "" if bytes_ is None else f"; peak {bytes_['median'] / 1e6:7.0f} MB, {row['peak_ratio']['median']:.3f}"
            )
            lines.append(f"  {row['way']:<24} {kv}{peak}")
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
