"""Analyse a 3 GB model in a process limited to 2 GB of memory, and in one without a limit.

python benchmarks/large_model.py --folder runs/large-model --out benchmarks/results/large_model.json

The model has Llama's architecture, random weights in bfloat16 and the built-in model's tokenizer. It is written into the folder
once. Each run is a separate process:

- limited: RLIMIT_DATA limits private memory to --limit; `device_map="auto"` keeps --room bytes of weights in memory.
- limited, whole: the same limit without offloading, which must fail.
- unlimited: no limit, all weights in memory.

RLIMIT_DATA counts a mapped weight file in full, although the kernel can drop its pages at any time. The limited processes
therefore read safetensors with pread, so that every byte of a weight in use is private memory. The page cache is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accelerate.utils.offload
import torch
import transformers.modeling_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import headsink
from headsink import HeadsinkError
from headsink.models.distributed import input_device
from headsink.models.spec import decoder
from headsink.utils.files import new_folder, write_text

CONFIG = LlamaConfig(
    vocab_size=49_152,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)
SCORES = ("first", "sink", "local", "far", "entropy", "output")


def make(folder: Path) -> int:
    """Write the model layer by layer, with little memory. Returns the bytes of its weights."""
    if not (folder / "config.json").is_file():
        with torch.device("meta"):
            shapes = {
                name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(CONFIG).state_dict().items()
            }
        files: dict[str, list[str]] = {}
        for name in shapes:
            part = name.split(".")[2] if ".layers." in name else "ends"
            files.setdefault(f"model-{part}.safetensors", []).append(name)
        torch.manual_seed(0)
        with new_folder(folder, "config.json") as made:
            for file, names in files.items():
                weights = {
                    name: torch.ones(shapes[name], dtype=torch.bfloat16)
                    if len(shapes[name]) == 1
                    else torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.04)
                    for name in names
                }
                save_file(weights, made / file, metadata={"format": "pt"})
            index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
            (made / "model.safetensors.index.json").write_text(json.dumps(index))
            headsink.load("smollm2", device="cpu")[1].save_pretrained(made)
            CONFIG.save_pretrained(made)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Peaks(threading.Thread):
    """Sample this process's memory 100 times a second and keep the peaks: resident, private, and counted by RLIMIT_DATA."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = {"VmRSS": 0, "RssAnon": 0, "VmData": 0}

    def run(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.most:
                    self.most[name] = max(self.most[name], int(value.split()[0]) * 1024)
            time.sleep(0.01)


def run(arguments: argparse.Namespace) -> None:
    """Analyse the model in this process, save the scores, and print the measurements as JSON."""
    peaks = Peaks()
    peaks.start()
    torch.set_num_threads(arguments.threads)
    if arguments.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit, arguments.limit))
        transformers.modeling_utils.safe_open = accelerate.utils.offload.safe_open = _pread
    before = time.perf_counter()
    where = {"max_memory": {"cpu": arguments.room}} if arguments.room else {"device": "cpu"}
    try:
        model, tokenizer = headsink.load(arguments.folder, **where)
        loaded = time.perf_counter()
        with torch.no_grad():
            decoder(model)(torch.arange(arguments.tokens, device=input_device(model))[None], use_cache=False)
        forward = time.perf_counter()
        census = headsink.analyze(
            model, tokenizer, lengths=(arguments.tokens,), domains=("prose",), texts_per_domain=1, progress=False
        )
    except HeadsinkError as error:
        print(json.dumps({"failed": str(error)}))
        return
    done = time.perf_counter()
    save_file({name: census.score(name, arguments.tokens) for name in SCORES}, arguments.out)
    offloaded = sum(p.numel() * p.element_size() for p in model.parameters() if p.is_meta)
    figures = {
        "weights_on_disk": offloaded,
        "load_s": round(loaded - before, 1),
        "forward_s": round(forward - loaded, 1),
        "analyze_s": round(done - forward, 1),
        "s_per_1000_tokens": round((done - forward) * 1000 / arguments.tokens, 1),
        "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_private": peaks.most["RssAnon"],
        "peak_counted_by_limit": peaks.most["VmData"],
    }
    print(json.dumps(figures))


def _pread(file: str | os.PathLike[str], **options: Any) -> Any:
    return safe_open(file, **{**options, "backend": "pread"})


def start(arguments: argparse.Namespace, scores: Path, *, limit: int = 0, room: int = 0) -> dict[str, Any]:
    """Start one run in a separate process. MALLOC_ARENA_MAX limits the freed memory that glibc keeps per thread."""
    options = {"folder": arguments.folder, "tokens": arguments.tokens, "threads": arguments.threads, "out": scores}
    command = [sys.executable, __file__, "--run", *(f"--{name}={value}" for name, value in options.items())]
    command += [f"--limit={limit}", f"--room={room}"]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    print(f"limit {limit / 1e9:.1f} GB, room for weights {room / 1e9:.1f} GB: {figures}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=2_000_000_000, help="bytes of private memory")
    parser.add_argument("--room", type=int, default=600_000_000, help="bytes of weights that stay in memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments)
        return

    weights = make(arguments.folder)
    print(f"weights: {weights / 1e9:.2f} GB", flush=True)
    with TemporaryDirectory() as folder:
        limited, unlimited = Path(folder) / "limited", Path(folder) / "unlimited"
        runs = {
            "limited": start(arguments, limited, limit=arguments.limit, room=arguments.room),
            "limited, whole": start(arguments, limited.with_name("none"), limit=arguments.limit),
            "unlimited": start(arguments, unlimited),
        }
        found, expected = load_file(limited), load_file(unlimited)
    result = {
        "command": "python " + " ".join(sys.argv),
        "weights_bytes": weights,
        "parameters": weights // 2,
        "limit_bytes": arguments.limit,
        "room_bytes": arguments.room,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
        "processor": platform.machine(),
        "load_average": [round(n, 1) for n in os.getloadavg()],  # above `threads`: other processes were running too
        "versions": {
            name: version(name) for name in ("headsink", "torch", "transformers", "accelerate", "safetensors")
        },
        "runs": runs,
        "largest_difference": {name: float((found[name] - expected[name]).abs().max()) for name in SCORES},
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["largest_difference"]))


if __name__ == "__main__":
    main()
