"""TPOT of a batch: the compiled decode step against forward passes of the model, under a plan and with the full cache.

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
from headsink.cache.cache import PlanCache
from headsink.generation.decode import open_decoder, prepare
from headsink.models.transformers_names import cache_argument
from headsink.utils.files import write_text
from headsink.utils.statistics import spread


def random_cache(model: PreTrainedModel, plan: Plan, batch: int, tokens: int) -> PlanCache:
    cache, config = headsink.new_cache(model, plan, exact=False), model.config
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
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--context", type=int, default=7500)
    parser.add_argument("--batches", default="1,2,4,8", help="batch sizes")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, _ = headsink.load(arguments.model, dtype=arguments.dtype)
    plan = Plan.load(arguments.plan).model_copy(update={"quality": ()})
    prepare(model)
    found: dict[str, Any] = provenance(
        "seconds for a token of every sequence: the compiled step, and forward passes of the model"
    ) | {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "context": arguments.context,
        "kept": plan.kv_budget(arguments.context),
        "results": [],
    }
    for batch in map(int, arguments.batches.split(",")):
        tokens, times = torch.randint(5, 2000, (batch,)), dict[tuple[str, str], list[float]]()
        caches = {
            name: random_cache(model, one, batch, arguments.context)
            for name, one in (("plan", plan), ("full", Plan.full(model)))
        }
        for _ in range(arguments.rounds):
            for name, cache in caches.items():
                with torch.no_grad(), headsink.apply(model, cache.plan, exact=False):
                    for method, run in (("step", steps), ("passes", passes)):
                        times.setdefault((name, method), []).extend(run(model, cache, tokens, arguments.tokens))
        for (name, method), seconds in times.items():
            found["results"].append({"texts": batch, "cache": name, "way": method, "token_s": spread(seconds)})
            print(
                f"{batch} sequences, {name}, {method}: {1e3 * found['results'][-1]['token_s']['median']:.1f} ms",
                file=sys.stderr,
            )
    write_text(arguments.out, json.dumps(found, indent=1))
    print(f"-> {arguments.out}")


if __name__ == "__main__":
    main()
