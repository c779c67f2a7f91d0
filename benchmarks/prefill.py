"""Time to read a prompt under a plan, against transformers, and peak bytes of the KV cache meanwhile.

python benchmarks/prefill.py --contexts 2000,6000 --out benchmarks/results/prefill-smollm2.json

Per round, in turn: transformers with its full cache; dense prefill with eviction (`headsink.compress`); sparse prefill; dense
prefill with context reconstruction. Ratios are taken within a round. The peak is the largest sum, over the layers, of the bytes
of the cache and of the full keys and values of the layer that is read.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import headsink
from headsink.bench.heading import machine, provenance
from headsink.cache.cache import nbytes
from headsink.data import corpus
from headsink.models.spec import decoder, describe
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.prefill import prefill
from headsink.utils.files import write_text
from headsink.utils.statistics import spread

METHODS = ("transformers", "dense", "sparse", "reconstruction")


def read(model: PreTrainedModel, plan: Plan, ids: Tensor, method: str) -> None:
    if method == "transformers":
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        return
    cache = headsink.new_cache(model, plan, exact=False, prefill="sparse" if method == "sparse" else "dense")
    prefill(model, plan, ids, cache=cache, reconstruct=method == "reconstruction")


def peak_bytes(model: PreTrainedModel, plan: Plan, ids: Tensor) -> dict[str, float]:
    """Bytes of the plan and of one full layer, and the peak of dense prefill."""
    cache, shape = headsink.new_cache(model, plan, exact=False), describe(model)
    layer = 2 * shape.kv_heads * shape.head_dim * ids.shape[1] * model.dtype.itemsize
    peaks: list[int] = []

    def measure(module: nn.Module, given: Any, output: Any) -> None:
        peaks.append(nbytes(cache) + layer)

    hooks = [block.self_attn.register_forward_hook(measure) for block in decoder(model).layers]
    prefill(model, plan, ids, cache=cache)
    for hook in hooks:
        hook.remove()
    peak, kept = max(peaks), nbytes(cache)
    return {"plan": kept, "layer": layer, "peak": peak, "layers_above_plan": (peak - kept) / layer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="2000,6000")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = headsink.load("smollm2", dtype=arguments.dtype, device="cpu")
    found: dict[str, Any] = provenance("seconds to read a prompt, ratios to transformers, and bytes of the KV cache")
    found |= {"machine": machine(), "dtype": arguments.dtype, "budget": arguments.budget, "results": []}
    for context in (int(text) for text in arguments.contexts.split(",")):
        ids = torch.tensor([corpus.tokens("prose", tokenizer, context, seed=3, split="heldout")])
        plan = headsink.packaged_plan("smollm2", arguments.budget, context).model_copy(update={"quality": ()})
        for method in METHODS:
            read(model, plan, ids[:, :300], method)  # kernels are compiled here
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for number in range(arguments.rounds):
            for method in METHODS if number % 2 == 0 else reversed(METHODS):
                start = time.perf_counter()
                read(model, plan, ids, method)
                seconds[method].append(time.perf_counter() - start)
        ratios = {
            method: spread([own / base for own, base in zip(times, seconds["transformers"], strict=True)])
            for method, times in seconds.items()
        }
        times = {method: spread(values) for method, values in seconds.items()}
        row = {"context": context, "seconds": times, "ratios": ratios, "bytes": peak_bytes(model, plan, ids)}
        found["results"].append(row)
        write_text(arguments.out, json.dumps(found, indent=1) + "\n")
        medians = ", ".join(f"{method} {ratio['median']:.2f}x" for method, ratio in ratios.items())
        print(f"{context} tokens: {medians}; peak: plan + {row['bytes']['layers_above_plan']:.2f} layers")  # type: ignore[index]


if __name__ == "__main__":
    main()
