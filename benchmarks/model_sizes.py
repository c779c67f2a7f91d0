"""TTFT and TPOT by model size, on a CPU: models of published shapes with random weights, with transformers and under a plan.

python benchmarks/model_sizes.py --out benchmarks/results/model-sizes.json

Times do not depend on the weights, answers do, so nothing here is about quality. The heads of a model get the sizes that the
packaged plan of SmolLM2 gives its heads, drawn at random. Ways alternate; results are medians with minimum and maximum. `limit_s`
is the time that reading the weights and the cache takes at the bandwidth of memory. Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

import headsink
from headsink import Plan
from headsink.bench.comparison import BASE
from headsink.bench.heading import provenance
from headsink.bench.limit import limits, read_bandwidth, token_bytes
from headsink.bench.peers.process import summarize_times
from headsink.bench.speed import Configuration
from headsink.eviction.scorers import LINEAR
from headsink.models.spec import describe
from headsink.utils.files import write_text
from headsink.utils.statistics import spread

LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": LlamaConfig(
        **LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": LlamaConfig(
        **LLAMA,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        **LLAMA, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32
    ),
}


def drawn_plan(model: PreTrainedModel, budget: float, context: int) -> Plan:
    """Return a plan with the patterns of SmolLM2's packaged plan, at random heads."""
    patterns = [
        head.pattern for layer in headsink.packaged_plan("smollm2", budget, context).layers for head in layer or ()
    ]
    shape, rng = describe(model), random.Random(0)
    rows = [[rng.choice(patterns) for _ in range(shape.kv_heads)] for _ in shape.attending]
    return Plan.of(model, rows, 0.1 * torch.randn(len(rows), shape.kv_heads, LINEAR.n_features(shape.head_dim)))


def measure(model: PreTrainedModel, arguments: argparse.Namespace, context: int) -> dict[str, Any]:
    plan = drawn_plan(model, arguments.budget, context)
    configurations = (
        Configuration(BASE, model, None),
        Configuration("headsink, full", model, Plan.full(model), compiled=True),
        Configuration("headsink, plan", model, plan, compiled=True),
    )
    ways = {one.name: one for one in configurations}
    prompt = [torch.randint(5, 2000, (context,)).tolist()]
    for way in ways.values():
        way.run([prompt[0][:256]], 3)  # kernels are compiled here
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    bandwidth = []
    for number in range(arguments.rounds):
        bandwidth.append(read_bandwidth())
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            done = ways[name].run(prompt, arguments.tokens)
            found[name].append(summarize_times(done["times"]) | {"kv_bytes": done["kv_bytes"]})
    rows: dict[str, Any] = {"context": context, "kv_budget": plan.kv_budget(context), "read_bytes_per_s": bandwidth}
    for name, runs in found.items():
        row: dict[str, Any] = {"kv_bytes": runs[0]["kv_bytes"]}
        for key, label in (("prefill_s", "ttft"), ("decode_s", "tpot")):
            row[f"{label}_s"] = spread([run[key] for run in runs])
            pairs = zip(runs, found[BASE], strict=True)
            row[f"{label}_of_transformers"] = spread([own[key] / base[key] for own, base in pairs])
        row["limit_s"] = (token_bytes(model) + row["kv_bytes"]) / max(bandwidth)
        rows[name] = row
        print(
            f"{context} {name}: TTFT {row['ttft_s']['median']:.2f} s, {row['ttft_of_transformers']['median']:.2f}x; "
            f"TPOT {1e3 * row['tpot_s']['median']:.1f} ms, {row['tpot_of_transformers']['median']:.2f}x, "
            f"memory allows {1e3 * row['limit_s']:.1f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CONFIGS))
    parser.add_argument("--contexts", default="2000")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = provenance("TTFT and TPOT of models with random weights, by size") | {
        "dtype": "bfloat16",
        "limits": limits("cpu"),
        "models": {},
    }
    for name in arguments.models.split(","):
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).eval()
        print(f"{name}: {token_bytes(model) / 1e9:.2f} GB of weights")
        found["models"][name] = {"token_bytes": token_bytes(model), "results": []}
        for context in map(int, arguments.contexts.split(",")):
            found["models"][name]["results"].append(measure(model, arguments, context))
            write_text(arguments.out, json.dumps(found, indent=1))
        del model  # before the next one is made: two do not fit into memory
    print(f"-> {arguments.out}")


if __name__ == "__main__":
    main()
