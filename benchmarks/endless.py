"""Streaming generation with cache-relative positions (StreamingLLM, arXiv 2309.17453): score and generate 50,000 tokens.

python benchmarks/endless.py --out benchmarks/results/endless-smollm2.json

Texts of several domains are scored in chunks through one cache. Each joins the held-out and the calibration half of a domain,
since one half is too short and nothing is calibrated here. The loss of the last 10,000 tokens is compared with that of tokens
4,000 to 8,000, which are within the model's maximum length, and with the loss of the same last tokens in a text that begins
4,000 tokens before them, which separates the effect of length from that of the text. Then 50,000 tokens are sampled. Memory of
the cache and of the process is recorded every thousand tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import headsink
from headsink import Pattern, Plan
from headsink.bench.heading import provenance
from headsink.cache.cache import PlanCache
from headsink.data import corpus
from headsink.errors import HeadsinkError
from headsink.models.transformers_names import cache_argument
from headsink.utils.files import write_text

REFERENCE = 4_000, 8_000  # range of tokens within the model's maximum, past the beginning
LAST = 10_000
LEAD = 4_000  # tokens before the last ones in the short text
CHUNK = 512
EVERY = 1_000  # tokens between two measurements of memory
TEXTS = (("prose", 0), ("prose", 1), ("code", 0), ("maths", 0))


def resident() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def score(model: PreTrainedModel, plan: Plan, ids: list[int], memory: list[dict[str, int]] | None = None) -> Tensor:
    """Return the NLL of every token but the first in nats, float32 [tokens - 1]."""
    cache, text, found = headsink.new_cache(model, plan), torch.tensor([ids]), []
    for start in range(0, len(ids), CHUNK):
        chunk = text[:, start : start + CHUNK]
        with headsink.apply(model, plan), torch.no_grad():
            logits = model(chunk, **cache_argument(cache), use_cache=True).logits[0]
        targets = text[0, start + 1 : start + 1 + CHUNK]
        found.append(torch.nn.functional.cross_entropy(logits[: len(targets)].float(), targets, reduction="none"))
        if memory is not None and (start // EVERY) != ((start + CHUNK) // EVERY):
            memory.append({"tokens": start + chunk.shape[1], "kv_bytes": cache.nbytes(), "resident": resident()})
    return torch.cat(found)


class MemoryRecorder(BaseStreamer):
    """Record memory every `EVERY` generated tokens."""

    def __init__(self, cache: PlanCache):
        self.cache, self.tokens, self.prompt, self.records = cache, 0, True, []  # type: ignore[var-annotated]

    def put(self, value: Tensor) -> None:
        self.tokens += int(value.numel())
        if self.tokens % EVERY == 0:
            self.records.append({"tokens": self.tokens, "kv_bytes": self.cache.nbytes(), "resident": resident()})

    def end(self) -> None:
        pass


def generate(model: PreTrainedModel, plan: Plan, ids: list[int], tokens: int) -> dict[str, Any]:
    """Sample tokens after a prompt."""
    cache = headsink.new_cache(model, plan)
    recorder, prompt, start = MemoryRecorder(cache), torch.tensor([ids]), time.perf_counter()
    with headsink.apply(model, plan):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache_argument(cache),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            streamer=recorder,
        )
    seconds = time.perf_counter() - start
    return {"tokens": out.shape[1] - len(ids), "seconds": seconds, "memory": recorder.records}


def flat(memory: list[dict[str, int]], name: str) -> float:
    """Return max / min - 1 over the records past the model's maximum length."""
    values = [row[name] for row in memory if row["tokens"] > REFERENCE[1]]
    return max(values) / min(values) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = headsink.load(arguments.model, dtype=arguments.dtype)
    pattern = Pattern(arguments.sink, 0, arguments.window)
    plan = Plan.uniform(model, pattern, positions="cache-relative")
    torch.manual_seed(0)
    found: dict[str, Any] = provenance(
        "NLL and memory of streaming generation far past the model's maximum, with cache-relative positions"
    ) | {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "pattern": str(pattern),
        "maximum": model.config.max_position_embeddings,
        "texts": [],
    }
    for domain, seed in TEXTS:
        halves: tuple[corpus.Split, ...] = ("heldout", "calibration") if seed % 2 == 0 else ("calibration", "heldout")
        ids = [
            token
            for half in halves
            for token in corpus.tokens(domain, tokenizer, arguments.tokens // 2, seed=seed, split=half)
        ]
        memory: list[dict[str, int]] = []
        start = time.perf_counter()
        nll = score(model, plan, ids, memory)
        row = {
            "domain": domain,
            "seed": seed,
            "seconds": time.perf_counter() - start,
            "settled": float(nll[REFERENCE[0] - 1 : REFERENCE[1] - 1].mean()),
            "last": float(nll[-LAST:].mean()),
            "last_fresh": float(score(model, plan, ids[-LAST - LEAD :])[-LAST:].mean()),
            "by_thousand": [round(float(part.mean()), 4) for part in nll.split(EVERY)],
            "kv_flat": flat(memory, "kv_bytes"),
            "resident_flat": flat(memory, "resident"),
            "memory": memory,
        }
        found["texts"].append(row)
        write_text(arguments.out, json.dumps(found, indent=1))
        print({name: row[name] for name in ("domain", "settled", "last", "last_fresh", "kv_flat", "resident_flat")})
    scored = found["texts"]
    means = {name: sum(row[name] for row in scored) / len(scored) for name in ("settled", "last", "last_fresh")}
    found["mean"] = means | {"last_to_settled": means["last"] / means["settled"] - 1}
    found["mean"]["last_to_fresh"] = means["last"] / means["last_fresh"] - 1
    try:
        score(model, Plan.uniform(model, pattern), ids)
    except HeadsinkError as error:
        found["positions_text"] = str(error)
    generated = generate(
        model, plan, corpus.tokens("prose", tokenizer, 1000, seed=3, split="heldout"), arguments.tokens
    )
    found["generated"] = generated | {
        name: flat(generated["memory"], of) for name, of in (("kv_flat", "kv_bytes"), ("resident_flat", "resident"))
    }
    write_text(arguments.out, json.dumps(found, indent=1))
    print(found["mean"], {name: found["generated"][name] for name in ("seconds", "kv_flat", "resident_flat")})
    print(f"-> {arguments.out}")


if __name__ == "__main__":
    main()
