"""GPU benchmark: check headsink's kernels against float64, then time them against FlashAttention, SDPA and transformers.

python benchmarks/gpu.py --out benchmarks/results/gpu-h100.json        # under 8 minutes on an H100
python benchmarks/gpu.py --rehearse --out rehearsal.json                 # without a GPU: small shapes, by Triton's interpreter

Weights, keys and queries are random, with the shapes of Llama-3.1-8B and Llama-3.2-1B, in bfloat16. A failed check ends the run
with status 1. Kernels are timed as CUDA graphs with the L2 cache flushed in between; tokens of a model in wall time, with all
overhead. Results are medians with minimum and maximum, next to the bandwidth and the matrix throughput of the machine. The most
important parts run first; a part for which no time is left becomes a row "not measured".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from gpu_cases import (
    MODELS,
    REHEARSED,
    Heads,
    census_of_a_layer,
    decode_kernel,
    flex_attention_prefill,
    full_kernels,
    largest_errors,
    prefill_kernel,
    sizes,
    tuning,
)
from gpu_models import Rig

from headsink.bench.heading import provenance
from headsink.utils import device as gpu
from headsink.utils.files import write_text
from headsink.utils.statistics import spread

BUDGETS = (1.0, 0.5, 0.25, 0.125)


class Clock:
    """Time work on a device. `left()`: seconds until the end of the time limit."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.end = device, time.monotonic() + seconds
        self.flush = torch.empty(2**28 if device.type == "cuda" else 1, dtype=torch.uint8, device=device)

    def left(self) -> float:
        return self.end - time.monotonic()

    def kernel(self, run: Callable[[], Any], repeats: int = 20) -> dict[str, Any]:
        """Time a short, repeatable launch in seconds, as a CUDA graph."""
        if self.device.type != "cuda":
            return self.host(run, 1)
        for _ in range(2):  # warm-up: kernels are compiled here
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 2)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return _without_all([start.elapsed_time(end) / 1e3 for start, end in events[2:]])

    def host(self, run: Callable[[], Any], repeats: int = 3) -> dict[str, Any]:
        """Measure wall time in seconds, with all overhead."""
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return _without_all(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _without_all(times: list[float]) -> dict[str, Any]:
    return {name: value for name, value in spread(times).items() if name != "all"} | {"n": len(times)}


def machine(clock: Clock, small: bool) -> dict[str, Any]:
    """Return the card's name, and its copy and read bandwidth (bytes per second) and bfloat16 throughput (FLOP per second)."""
    device = clock.device
    size, width = (2**20, 256) if small else (2**31, 8192)
    whole = torch.randint(256, (2, size), dtype=torch.uint8, device=device)
    copy = clock.kernel(lambda: whole[1].copy_(whole[0]))
    read = clock.kernel(lambda: whole.view(torch.float32).amax())
    pair = torch.randn(2, width, width, device=device, dtype=torch.bfloat16)
    matmul = clock.kernel(lambda: pair[0] @ pair[1])
    found = {
        "copy_bytes_per_s": 2 * size / copy["median"],
        "read_bytes_per_s": 2 * size / read["median"],
        "matmul_flop_per_s": 2 * width**3 / matmul["median"],
        "name": "CPU, Triton's interpreter",
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"name": card.name, "memory": card.total_memory, "multiprocessors": card.multi_processor_count}
    return found


def kernels(clock: Clock, copy_rate: float, small: bool) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Yield the parts about single layers: decode and prefill attention, and the census. copy_rate: bytes per second."""
    contexts = (256, 512) if small else (131_072, 32_768, 8192)
    for name, shape in {"rehearsed": REHEARSED}.items() if small else MODELS.items():
        for context in contexts:
            for batch in (1,) if small else (1, 4, 16):

                def decode(shape: Heads = shape, context: int = context, batch: int = batch) -> list[dict[str, Any]]:
                    return decode_kernel(clock, shape, context, batch, BUDGETS, copy_rate)

                yield f"decode attention, {name}, {context} tokens, batch {batch}", decode

            def prefill(shape: Heads = shape, context: int = context) -> list[dict[str, Any]]:
                return prefill_kernel(clock, shape, context, BUDGETS[1:])

            yield f"prefill attention, {name}, {context} tokens", prefill
    if not small:
        yield (
            "decode attention, Llama-3.1-8B, 1048576 tokens, batch 1",
            lambda: decode_kernel(clock, MODELS["Llama-3.1-8B"], 2**20, 1, BUDGETS, copy_rate),
        )
    shape, tokens = (REHEARSED, 256) if small else (MODELS["Llama-3.1-8B"], 131_072)
    yield "census of a layer", lambda: census_of_a_layer(clock, shape, tokens)


def others(clock: Clock, small: bool) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Yield the parts for development: FlexAttention, and other launch shapes of the kernels."""
    shape, tokens = (REHEARSED, 256) if small else (MODELS["Llama-3.1-8B"], 131_072)
    yield f"FlexAttention, {tokens} tokens", lambda: flex_attention_prefill(clock, shape, tokens, 0.25)
    yield f"tuning, {tokens} tokens", lambda: tuning(clock, shape, tokens)


def models(clock: Clock, small: bool) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Yield the parts about whole models: first token, decoding, lossless mode, memory."""
    contexts = (128,) if small else (131_072, 8192, 32_768)
    for name in ("Llama-3.1-8B", "Llama-3.2-1B")[: 1 if small else 2]:
        rig = Rig(clock, name, small)
        for context in contexts:
            for batch in (1,) if small else (1, 2, 4, 16):
                if batch == 2 and rig.fits(context, 4):
                    continue  # batch 2 is only for contexts at which batch 4 does not fit
                if rig.fits(context, batch):
                    yield (
                        f"{name}, {context} tokens, batch {batch}: decode",
                        lambda r=rig, c=context, b=batch: r.decode(c, b, BUDGETS),  # type: ignore[misc]
                    )
            yield (
                f"{name}, {context} tokens, batch 1: first token",
                lambda r=rig, c=context: r.first_token(c, (1.0, 0.25)),  # type: ignore[misc]
            )
        batch = next((b for b in (4, 2, 1) if rig.fits(contexts[0], b, lossless=True)), None)
        if batch is not None:
            yield (
                f"{name}, {contexts[0]} tokens, batch {batch}: lossless",
                lambda r=rig, b=batch: r.lossless(contexts[0], b, 0.125),  # type: ignore[misc]
            )
        rig.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON, written after every part")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part starts after this time")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU; the times mean nothing")
    parser.add_argument("--only", default="", help="parts whose names contain this")
    arguments = parser.parse_args()
    small = arguments.rehearse
    if small:
        gpu.DEVICES = {"cpu"}
    elif not torch.cuda.is_available():
        print("gpu: no CUDA GPU found; --rehearse runs small shapes without one", file=sys.stderr)
        raise SystemExit(2)
    clock = Clock(torch.device("cpu" if small else "cuda"), 60 * arguments.minutes)
    torch.manual_seed(0)
    found: dict[str, Any] = provenance("attention and models on a GPU, seconds; a rehearsal" if small else "on a GPU")
    found["machine"] |= machine(clock, small)
    found["full_kernels"] = full_kernels(clock.device)
    found["errors"] = largest_errors(clock.device, small)
    found["results"] = []
    failed = [row for row in found["errors"] if not row["right"]]
    write_text(arguments.out, json.dumps(found, indent=1))
    for row in found["errors"]:
        print(f"{'right' if row['right'] else 'WRONG'}  {row['what']}: {row['error']:.1e}", flush=True)
    if failed:
        raise SystemExit(1)
    copy_rate = found["machine"]["copy_bytes_per_s"]
    for source in (kernels(clock, copy_rate, small), models(clock, small), others(clock, small)):
        for name, run in source:
            if arguments.only not in name:
                continue
            if clock.left() < 0:
                rows: list[dict[str, Any]] = [{"not measured": "no time left"}]
            else:
                try:
                    rows = run()
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    rows = [{"not measured": "it does not fit into the card's memory"}]
            for row in rows:
                found["results"].append({"part": name} | row)
                print(line(found["results"][-1]), flush=True)
            write_text(arguments.out, json.dumps(found, indent=1))
    print(f"{sum(sizes(0.25, 131_072, 8)) / 8 / 131_072:.3f} of the keys at a budget of 0.25\n-> {arguments.out}")


def line(row: dict[str, Any]) -> str:
    """Format a row as a line."""
    parts = []
    for name, value in row.items():
        if name == "part":
            continue
        if isinstance(value, dict):
            value = f"{1e3 * value['median']:.3f} ms"
        parts.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}")
    return f"{row['part']}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
