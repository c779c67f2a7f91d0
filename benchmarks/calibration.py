"""What making a plan takes: seconds and memory of `headsink plan`, each time in a process of its own.

python benchmarks/calibration.py --out benchmarks/results/calibration-smollm2.json

"load" only loads the model and reads one text of the context: what any use of the model takes. Peak memory is the largest that a
process had resident; `model_bytes` are the model's weights. The machine should do nothing else.
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
WAYS = {"running": (), "prefill_compression": ("--prefill-compression",), "retold": ("--reconstruct",)}


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command: wall seconds, and the peak resident memory of its process in bytes."""
    start = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_CLOSE, 1)])
    _, status, used = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": used.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", default="2000,6000")
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if unknown := set(arguments.ways.split(",")) - set(WAYS):
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
        "budget": float(arguments.budget),
        "runs": [],
    }
    del model
    for context in arguments.contexts.split(","):
        commands = {"load": [sys.executable, "-c", LOAD, arguments.model, context]}
        with tempfile.TemporaryDirectory() as folder:
            plan = [str(Path(sys.executable).with_name("headsink")), "plan", arguments.model, "--context", context]
            plan += ["--budget", arguments.budget, "--quality", "none", "--out", f"{folder}/plan.json"]
            commands |= {way: [*plan, *WAYS[way]] for way in arguments.ways.split(",")}
            for way, command in commands.items():
                run = {"way": way, "context": int(context)} | measure(command)
                found["runs"].append(run)
                print(f"{context} {way}: {run['seconds']} s, {run['peak_bytes'] / 2**20:.0f} MiB", file=sys.stderr)
                write_text(arguments.out, json.dumps(found, indent=1))
    print(f"-> {arguments.out}")


if __name__ == "__main__":
    main()
