"""TTFT and TPOT of headsink and llama.cpp on the same text, measured alternately.

npm install --prefix runs/llama node-llama-cpp --ignore-scripts
python benchmarks/llama_cpp.py --plan plan.json --node runs/llama --out benchmarks/results/llama-cpp-smollm2.json

llama.cpp runs the built-in model's 4-bit weights with a float16 KV cache and flash attention. headsink runs the same weights in
bfloat16, under a plan and with the full cache. Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import headsink
from headsink.data import corpus
from headsink.generation.generate import generate
from headsink.models.builtin import BUILT_IN
from headsink.plan.plan import Plan
from headsink.utils.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--node", type=Path, required=True, help="folder with node-llama-cpp in its node_modules")
    parser.add_argument("--contexts", default="512,2048,7500")
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    contexts = [int(part) for part in arguments.contexts.split(",")]
    model, tokenizer = headsink.load("smollm2", dtype="bfloat16")
    ids = corpus.tokens("prose", tokenizer, max(contexts), seed=0, split="heldout")
    plans = {"headsink, plan": Plan.load(arguments.plan), "headsink, full": Plan.full(model)}
    package = arguments.node / "node_modules" / "node-llama-cpp" / "package.json"
    found: dict[str, Any] = {
        "what": "TTFT and TPOT of llama.cpp (Q4_1 weights, float16 KV) and headsink (bfloat16), measured alternately",
        "command": "python " + " ".join(sys.argv),
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")}
        | {"node-llama-cpp": json.loads(package.read_text(encoding="utf-8"))["version"]},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "rounds": arguments.rounds,
        "results": [],
    }
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(str(tokenizer.decode(ids)), encoding="utf-8")
        weights = next(path for path in BUILT_IN["smollm2"].paths() or () if path.suffix == ".gguf")
        command = [
            "node",
            str(Path(__file__).with_suffix(".mjs")),
            str(arguments.node.resolve()),
            str(weights),
            str(text),
        ]
        command += [arguments.contexts, str(arguments.tokens), str(torch.get_num_threads())]
        generate(model, tokenizer, ids[:64], plans["headsink, plan"], max_new_tokens=3)
        for _ in range(arguments.rounds):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                row = json.loads(line)
                runs.setdefault((row.pop("context"), "llama.cpp"), []).append(row)
            for context in contexts:
                for name, plan in plans.items():
                    one = generate(
                        model,
                        tokenizer,
                        ids[:context],
                        plan,
                        max_new_tokens=arguments.tokens,
                        min_new_tokens=arguments.tokens,
                    )
                    row = {"prefill_s": one.first_token_s, "decode_s": statistics.median(one.steps_s)}
                    runs.setdefault((context, name), []).append(row)
    for (context, name), rows in sorted(runs.items()):
        figures = {}
        for key in ("prefill_s", "decode_s"):
            values = [row[key] for row in rows]
            figures[key] = {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}
        found["results"].append({"context": context, "way": name} | figures)
        prefill, decode = (figures[key]["median"] for key in ("prefill_s", "decode_s"))
        print(f"{context:>6} {name:<16} prefill {prefill:6.2f} s, decode {1e3 * decode:5.1f} ms")
    write_text(arguments.out, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
