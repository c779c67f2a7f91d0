"""Time and peak memory of `headsink plan`, each run in a separate process.

python benchmarks/calibration.py --out benchmarks/results/calibration-smollm2.json

"load" loads the model and runs one prefill of the context: the baseline of any use of the model. Peak memory is the maximum
resident memory of a process; `model_bytes` is the size of the model's weights. Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import headsink
from headsink.utils.files import write_text

LOAD = (
    "import sys, torch, headsink; model, _ = headsink.load(sys.argv[1]); torch.set_grad_enabled(False); "
    "model(torch.arange(1000, 1000 + int(sys.argv[2]))[None], logits_to_keep=1)"
)
METHODS = {"budget": ("--budget", "0.25"), "no_budget": (), "no_top_k": ("--budget", "0.25", "--no-top-k")}


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command and return its wall time in seconds and its peak resident memory in bytes."""
    start = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_CLOSE, 1)])
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", default="2000,6000")
    parser.add_argument("--ways", default=",".join(METHODS), help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if unknown := set(arguments.ways.split(",")) - set(METHODS):
        parser.error(f"--ways: {', '.join(sorted(unknown))} unknown")
    model, _ = headsink.load(arguments.model)
    found: dict[str, Any] = {
        "what": "time and peak memory of calibrations, without quality on held-out text",
        "command": "python " + " ".join(sys.argv),
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "model": arguments.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "runs": [],
    }
    del model
    for context in arguments.contexts.split(","):
        commands = {"load": [sys.executable, "-c", LOAD, arguments.model, context]}
        with tempfile.TemporaryDirectory() as folder:
            plan = [str(Path(sys.executable).with_name("headsink")), "plan", arguments.model, "--context", context]
            plan += ["--quality", "none", "--out", f"{folder}/plan.json"]
            commands |= {method: [*plan, *METHODS[method]] for method in arguments.ways.split(",")}
            for method, command in commands.items():
                run = {"way": method, "context": int(context)} | measure(command)
                found["runs"].append(run)
                print(f"{context} {method}: {run['seconds']} s, {run['peak_bytes'] / 2**20:.0f} MiB", file=sys.stderr)
                write_text(arguments.out, json.dumps(found, indent=1))
    print(f"-> {arguments.out}")


if __name__ == "__main__":
    main()
