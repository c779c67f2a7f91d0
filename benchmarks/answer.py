"""A plan against the model itself on one long prompt: time to the first token, time per token, memory of the cache.

python benchmarks/answer.py --plan runs/demo/plan.json --out benchmarks/results/answer.json

Both run in turn, `--rounds` times, in one process, after a warm-up; the medians are to be quoted, the spread stands beside
them. The prompt is held-out prose, the answer is greedy and of fixed length.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import headsink
from headsink import corpus
from headsink.files import write_text
from headsink.generation import Generated, generate
from headsink.plan import Plan


def summary(runs: list[Generated]) -> dict[str, Any]:
    """Median, least and most of each figure; the bytes are the same every time."""
    figures: dict[str, Any] = {"kv_bytes": runs[0].kv_bytes}
    for name in ("first_token_s", "token_s"):
        values = [getattr(run, name) for run in runs]
        figures[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    model, tokenizer = headsink.load(arguments.model, dtype=arguments.dtype)
    plan = Plan.load(arguments.plan)
    ids = corpus.tokens("prose", tokenizer, arguments.tokens, seed=11, split="heldout")
    runs: dict[str, list[Generated]] = {"full": [], "plan": []}
    options = {"min_new_tokens": arguments.new_tokens, "max_new_tokens": arguments.new_tokens}
    generate(model, tokenizer, ids[:500], plan, **options)
    for round_number in range(arguments.rounds):
        for name, used in (("full", None), ("plan", plan)):
            runs[name].append(generate(model, tokenizer, ids, used, **options))
            last = runs[name][-1]
            print(
                f"round {round_number} {name}: first token {last.first_token_s:.2f} s, then {last.token_s} s",
                flush=True,
            )
    result = {
        "command": "python " + " ".join(sys.argv),
        "model": plan.model.model_dump(),
        "plan": {"kept": plan.kept(arguments.tokens), "counts": plan.counts(), "calibration": plan.calibration},
        "quality": [quality.model_dump() for quality in plan.quality],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "prompt_tokens": arguments.tokens,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
        "results": {name: summary(found) for name, found in runs.items()},
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["results"], indent=1))


if __name__ == "__main__":
    main()
