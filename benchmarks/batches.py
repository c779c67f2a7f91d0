"""TPOT of a batch: the compiled decode step against forward passes of the model, under a plan and with the full cache, and with
caches in 8 bits. `limit_s` is the time that reading the weights and the cache takes at the bandwidth of memory.

python benchmarks/batches.py --plan plan.json --out benchmarks/results/batches-smollm2.json

The caches are filled with random keys, because the time of a step does not depend on their values. Configurations alternate;
results are medians with minimum and maximum. Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import headsink
from headsink import Plan
from headsink.bench.heading import provenance
from headsink.bench.limit import read_bandwidth, token_bytes
from headsink.cache.cache import PlanCache
from headsink.decoding.step import open_decoder, prepare
from headsink.models.transformers_names import cache_argument
from headsink.utils.files import write_text
from headsink.utils.statistics import spread


def random_cache(model: PreTrainedModel, plan: Plan, batch: int, tokens: int, kv_dtype: Any) -> PlanCache:
    cache, config = headsink.new_cache(model, plan, exact=False, kv_dtype=kv_dtype), model.config
    shape = batch, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads
    for layer in cache.layers:
        layer.fill(*torch.randn(2, *shape, dtype=model.dtype), None)  # type: ignore[attr-defined]
    return cache


def steps(model: PreTrainedModel, cache: PlanCache, tokens: Tensor, count: int) -> list[float]:
    """Return the seconds per token of the compiled decode step, without the first step, which reads addresses."""
    times = []
    with open_decoder(model, cache) as step:
        for _ in range(count + 1):
            start = time.perf_counter()
            step.run(tokens)
            times.append(time.perf_counter() - start)
    return times[1:]


def passes(model: PreTrainedModel, cache: PlanCache, tokens: Tensor, count: int) -> list[float]:
    """Return the seconds per token of forward passes of the model, without the first."""
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        model(tokens[:, None], **cache_argument(cache), use_cache=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plan", type=Path, required=True, help="scaled to every context")
    parser.add_argument("--contexts", default="7500")
    parser.add_argument("--batches", default="1,2,4,8", help="batch sizes")
    parser.add_argument("--kv-dtype", default="auto,int8,k8v4")
    parser.add_argument("--ways", default="step,passes", help="passes: only with the dtype of the model")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, _ = headsink.load(arguments.model, dtype=arguments.dtype)
    plan = Plan.load(arguments.plan).model_copy(update={"quality": ()})
    kv_dtypes: list[Any] = arguments.kv_dtype.split(",")
    for kv_dtype in kv_dtypes:
        prepare(model, kv_dtype)
    found: dict[str, Any] = provenance(
        "seconds for a token of every sequence: the compiled step, and forward passes of the model"
    ) | {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "results": [],
    }
    for context in map(int, arguments.contexts.split(",")):
        for batch in map(int, arguments.batches.split(",")):
            _measure(arguments, model, plan.scale(context), context, batch, kv_dtypes, found["results"])
            write_text(arguments.out, json.dumps(found, indent=1))
    print(f"-> {arguments.out}")


def _measure(
    arguments: argparse.Namespace,
    model: PreTrainedModel,
    plan: Plan,
    context: int,
    batch: int,
    kv_dtypes: list[Any],
    results: list[dict[str, Any]],
) -> None:
    tokens, times, bandwidth = (
        torch.randint(5, 2000, (batch,)),
        dict[tuple[str, str, str], list[float]](),
        list[float](),
    )
    caches = {
        (name, kv_dtype): random_cache(model, one, batch, context, kv_dtype)
        for name, one in (("plan", plan), ("full", Plan.full(model)))
        for kv_dtype in kv_dtypes
    }
    for _ in range(arguments.rounds):
        bandwidth.append(read_bandwidth())
        for (name, kv_dtype), cache in caches.items():
            with torch.no_grad(), headsink.apply(model, cache.plan, exact=False, compiled=False):
                for way, run in (("step", steps), ("passes", passes)):
                    if way in arguments.ways and (way == "step" or kv_dtype == "auto"):
                        done = run(model, cache, tokens, arguments.tokens)
                        times.setdefault((name, kv_dtype, way), []).extend(done)
    for (name, kv_dtype, way), seconds in times.items():
        kv_bytes, kept = caches[name, kv_dtype].nbytes(), plan.kv_budget(context) if name == "plan" else 1.0
        row = {"context": context, "texts": batch, "cache": name, "kept": kept, "kv_dtype": kv_dtype, "way": way}
        row |= {"token_s": spread(seconds), "kv_bytes": kv_bytes}
        results.append(row | {"limit_s": (token_bytes(model) + kv_bytes) / max(bandwidth)})
        print(
            f"{context} tokens x {batch}, {name}, {kv_dtype}, {way}: {1e3 * spread(seconds)['median']:.1f} ms, memory allows "
            f"{1e3 * results[-1]['limit_s']:.1f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
