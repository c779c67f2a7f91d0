"""Time and peak memory of the census against a plain forward pass. Takes about 15 minutes on 2 cores.

python benchmarks/census.py --rounds 4 --out benchmarks/results/census.json

- plain: the model's decoder over the tokens with its fast attention and no cache.
- census: `analyze` on the same text, from tokenising to results.
- eager: `output_attentions=True`, whose attention matrices take layers x heads x N x N elements. It runs at lengths that double,
  up to the last one that fits in memory.

Times are taken in one process, alternately; every peak in a separate process. A peak is that of the whole process, weights
included, during the pass (on Linux; elsewhere it includes loading).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel, PreTrainedTokenizerBase

import headsink
from headsink.census.run import analyze
from headsink.data import corpus
from headsink.models.builtin import BUILT_IN
from headsink.models.devices import dtype_name
from headsink.models.spec import decoder, describe
from headsink.utils.files import write_text
from headsink.utils.progress import bar, console
from headsink.utils.statistics import spread

EAGER_FROM = 512
LONG_MODEL = "gemma3-270m"
LONG_SHAPE = "random weights of the shape of Gemma 3 270M"
MEGABYTE = 1e6


def run(model_name: str, tokens: int, rounds: int, long_tokens: int, device: str | None) -> dict[str, Any]:
    """Run all measurements. Memory is in bytes, time in seconds; progress goes to standard error."""
    model, tokenizer = headsink.load(model_name, device=device)
    eager_lengths, over = _eager_lengths(model, tokens)
    eager_ends = over and f"at {over} tokens its matrices alone would take {_matrices(model, over) / 1e9:.0f} GB"
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "model": model_name,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
        "tokens": tokens,
        "rounds": rounds,
        "seconds": _times(model, tokenizer, tokens, rounds),
    }
    plain, census = (result["seconds"][method]["all"] for method in ("plain", "census"))
    result["ratio"] = spread([b / a for a, b in zip(plain, census, strict=True)])
    del model
    result["peak_bytes"] = {
        method: _child(method, model_name, tokens, device)["peak_bytes"] for method in ("plain", "census")
    }
    result["peak_bytes"]["census_above_plain"] = result["peak_bytes"]["census"] - result["peak_bytes"]["plain"]
    result["eager"] = [
        {"tokens": n} | {method: _child(method, model_name, n, device) for method in ("eager", "census")}
        for n in eager_lengths
    ]
    result["eager_ends"] = eager_ends
    if long_tokens:
        result["long"] = {"tokens": long_tokens} | _child("census", LONG_MODEL, long_tokens, device)
    return result


def summary(result: dict[str, Any]) -> str:
    """Format the result in a few lines."""
    seconds, peaks = result["seconds"], result["peak_bytes"]
    lines = [
        f"{result['model']}, {result['tokens']} tokens, {result['dtype']}, {result['threads']} threads, "
        f"{result['rounds']} rounds",
        *(f"  {method}: {s['median']:.1f} s ({s['min']:.1f} to {s['max']:.1f})" for method, s in seconds.items()),
        f"  census / plain: {result['ratio']['median']:.2f} ({result['ratio']['min']:.2f} to {result['ratio']['max']:.2f})",
        f"  peak memory: plain {peaks['plain'] / MEGABYTE:.0f} MB, census {peaks['census_above_plain'] / MEGABYTE:+.0f} MB",
    ]
    for row in result["eager"]:
        eager, census = row["eager"], row["census"]
        lines.append(
            f"  {row['tokens']} tokens: eager {eager['seconds']:.1f} s, {eager['peak_bytes'] / MEGABYTE:.0f} MB; "
            f"census {census['seconds']:.1f} s, {census['peak_bytes'] / MEGABYTE:.0f} MB"
        )
    if result["eager_ends"]:
        lines.append(f"  eager stops here: {result['eager_ends']}")
    if long := result.get("long"):
        lines.append(
            f"{long['model']}, {long['tokens']} tokens: {long['seconds']:.0f} s, {long['peak_bytes'] / MEGABYTE:.0f} MB"
        )
    return "\n".join(lines)


def _times(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, rounds: int) -> dict[str, Any]:
    """Time plain and census alternately, in seconds, after a warm-up of each on a short text."""
    for method in ("plain", "census"):
        _pass(method, model, tokenizer, min(tokens, 512))
    found: dict[str, list[float]] = {"plain": [], "census": []}
    with bar("plain and census alternately", 2 * rounds, True) as shown:
        for number in range(rounds):
            for method in ("plain", "census") if number % 2 == 0 else ("census", "plain"):
                found[method].append(_pass(method, model, tokenizer, tokens))
                shown.advance(shown.task_ids[0])
    return {method: spread(values) for method, values in found.items()}


def _pass(method: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> float:
    """Return the seconds of one pass over a text of prose; tokenising counts for the census only."""
    ids = torch.tensor([corpus.tokens("prose", tokenizer, tokens, split="heldout")], device=model.device)
    start = time.perf_counter()
    if method == "census":
        analyze(model, tokenizer, lengths=[tokens], domains=["prose"], texts_per_domain=1, progress=False)
    else:
        with torch.no_grad():
            decoder(model)(ids, use_cache=False, output_attentions=method == "eager")
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def _eager_lengths(model: PreTrainedModel, most: int) -> tuple[list[int], int | None]:
    """Return lengths 512, 1024, ... whose matrices fit in half of the memory, and the first length that does not, if any."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lengths: list[int] = []
    n = EAGER_FROM
    while n <= most:
        if 2 * _matrices(model, n) > memory:
            return lengths, n
        lengths.append(n)
        n *= 2
    return lengths, None


def _matrices(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the model's attention matrices at a length."""
    shape = describe(model)
    return int(shape.layers * shape.query_heads * tokens * tokens * model.dtype.itemsize)


def _child(method: str, model_name: str, tokens: int, device: str | None) -> dict[str, Any]:
    """Run one pass in a separate process and return {"model", "seconds", "peak_bytes"}."""
    console.print(f"{method}, {tokens} tokens, in a separate process", style="dim", highlight=False)
    request = json.dumps({"method": method, "model_name": model_name, "tokens": tokens, "device": device})
    done = subprocess.run([sys.executable, __file__, "--pass", request], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method} at {tokens} tokens failed: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout))


def _measure(method: str, model_name: str, tokens: int, device: str | None) -> dict[str, Any]:
    name = model_name
    if model_name == LONG_MODEL and not BUILT_IN[LONG_MODEL].paths():
        name = LONG_SHAPE
        tokenizer = headsink.load("smollm2", device="cpu")[1]
        model = AutoModelForCausalLM.from_config(_gemma_shape(), attn_implementation="sdpa").eval()
    else:
        model, tokenizer = headsink.load(model_name, device=device)
    if method == "eager":
        model.set_attn_implementation("eager")
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak: loading takes more memory than the model
    seconds = _pass(method, model, tokenizer, tokens)
    return {"model": name, "seconds": seconds, "peak_bytes": _peak(model)}


def _peak(model: PreTrainedModel) -> int:
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gemma_shape() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=32768,
        layer_types=["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(18)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--long-tokens", type=int, default=32768, help="length on a model of the shape of Gemma 3 270M")
    parser.add_argument("--device")
    parser.add_argument("--pass", dest="request", help=argparse.SUPPRESS)  # of a separate process
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.request:
        print(json.dumps(_measure(**json.loads(given.request))))
        return
    result = run(given.model, given.tokens, given.rounds, given.long_tokens, given.device)
    if given.out is not None:
        write_text(given.out, json.dumps(result, indent=1) + "\n")
    print(summary(result))


if __name__ == "__main__":
    main()
