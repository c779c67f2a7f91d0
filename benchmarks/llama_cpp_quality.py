"""Quality of llama.cpp's quantised KV cache on held-out cases, against its own float16 cache.

npm install --prefix runs/llama node-llama-cpp --ignore-scripts
python benchmarks/cases.py --contexts 2000 --documents 2 --out runs/cases.json
python benchmarks/llama_cpp_quality.py --cases runs/cases.json --node runs/llama --out benchmarks/results/NAME.json

llama.cpp runs the built-in model's .gguf file (Q4_1 weights) with flash attention. It reads a case in batches of 512 tokens, and
each batch attends to keys and values that are rounded already. Then every continuation is scored on its own and erased. Keys and
values have the same type. Records have the form of plans.py.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from headsink.bench.heading import provenance
from headsink.models.builtin import BUILT_IN
from headsink.utils.files import write_text
from headsink.utils.statistics import interval

TYPES = {"F16": "f16", "Q8_0": "q8_0"}  # node-llama-cpp's names and llama.cpp's
SIZE = re.compile(r"size =\s+([\d.]+) MiB \(\s*(\d+) cells")


def measure(case: dict[str, Any], kind: str, node: Path, weights: Path) -> list[dict[str, Any]]:
    """Return a record for every continuation of a case, read with a KV cache of one type."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        file.write_text(json.dumps([case]), encoding="utf-8")
        script = str(Path(__file__).with_suffix(".mjs"))
        command = ["node", script, str(node.resolve()), str(weights), str(file), kind, str(torch.get_num_threads())]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    name = TYPES[kind]
    log = " ".join(found["sizes"])
    if f"K ({name})" not in log or f"V ({name})" not in log:
        sys.exit(f"llama.cpp did not make a cache of {name}: {log}")
    megabytes, cells = max((float(size), int(count)) for size, count in SIZE.findall(log))
    kv_bytes = megabytes * 2**20 / cells * len(case["ids"])
    scored = {part["form"]: part["scored"] for part in case["continuations"]}
    identity = {"method": f"llama.cpp, {name}", "budget": 1.0, "context": case["context"], "case": case["name"]}
    return [identity | part | {"scored": scored[part["form"]], "kv_bytes": kv_bytes} for part in found["parts"]]


def summary(records: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Compare a cache with the float16 one: delta NLL of texts with half of its 95 % interval, answers kept, share of bytes."""
    full, own = (
        {(r["case"], r["form"]): r for r in records if r["method"] == f"llama.cpp, {kind}"} for kind in ("f16", name)
    )
    changes = [record["nll"] - full[key]["nll"] for key, record in own.items() if key[1] == "text"]
    right = [key for key, record in full.items() if record["right"] and key[1] != "text"]
    return {
        "cache": name,
        "delta_nll": [float(x) for x in interval(torch.tensor(changes, dtype=torch.float64))],
        "answers": [sum(own[key]["right"] for key in right), len(right)],
        "kv_bytes": sum(r["kv_bytes"] for r in own.values()) / sum(r["kv_bytes"] for r in full.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="from benchmarks/cases.py")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--node", type=Path, required=True, help="folder with node-llama-cpp in its node_modules")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cases = json.loads(arguments.cases.read_text(encoding="utf-8"))["cases"]
    weights = next(path for path in BUILT_IN["smollm2"].paths() or () if path.suffix == ".gguf")
    package = arguments.node / "node_modules" / "node-llama-cpp" / "package.json"
    result = provenance("llama.cpp with quantised KV caches on held-out cases, against its float16 cache")
    result["versions"]["node-llama-cpp"] = json.loads(package.read_text(encoding="utf-8"))["version"]
    result |= {"weights": weights.name, "context": arguments.context}
    records: list[dict[str, Any]] = []
    for case in [case for case in cases if case["context"] == arguments.context]:
        for kind in TYPES:
            records += measure(case, kind, arguments.node, weights)
        rows = [summary(records, name) for name in TYPES.values()]
        print(case["name"], json.dumps(rows[-1]), flush=True)
        write_text(arguments.out, json.dumps(result | {"summary": rows, "records": records}, indent=1))


if __name__ == "__main__":
    main()
