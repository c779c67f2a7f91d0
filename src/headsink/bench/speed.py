"""Time to read a prompt and time per token, under a plan and without, against transformers; all in one process, in turn.

Every way reads the same text and then continues it greedily through `generate`. Prefill is the time until the first token is
there; a decode time is the median of the tokens after it. Ratios are taken within a round, in which every way runs once, and
their median over the rounds is to be quoted.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import headsink
from headsink import corpus
from headsink.bench import spread
from headsink.decode import refusal
from headsink.errors import HeadsinkError
from headsink.generation import generate
from headsink.models import dtype_name
from headsink.plan import Plan
from headsink.progress import bar

LEAST_CONTEXT = 16
BASE = "transformers"  # in the dtype asked for: what ratios are taken to


@dataclass(frozen=True)
class Way:
    """A way to generate: with which weights, under which plan, by which decode step."""

    name: str
    model: PreTrainedModel
    plan: Plan | None
    compiled: bool = False


def run(
    model_name: str,
    *,
    contexts: Sequence[int],
    tokens: int,
    rounds: int,
    plan: Plan | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """All measurements. Times in seconds, kv_bytes at the end of a text. `report` is given a line about each finished context."""
    model, tokenizer = headsink.load(model_name, dtype=dtype, device=device)
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    if wrong := [n for n in contexts if not LEAST_CONTEXT <= n <= longest - tokens]:
        raise HeadsinkError(
            f"contexts: {wrong[0]} is outside {LEAST_CONTEXT} to {longest - tokens}, with {tokens} tokens to come"
        )
    ways = _ways(model_name, model, plan, device)
    found: dict[str, Any] = {
        "what": "time to the first token and per token, and bytes of the KV cache",
        "command": "headsink " + " ".join(sys.argv[1:]),
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "model": model_name,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
        "compiled_step": refusal(model) or "used",
        "plan": None if plan is None else plan.counts(),
        "tokens": tokens,
        "rounds": rounds,
        "results": [],
    }
    for way in ways:  # what is compiled, is now
        _measure(way, tokenizer, min(contexts), 3, seed)
    for context in contexts:
        measured: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
        with bar(f"{context} tokens", rounds * len(ways), True) as shown:
            for number in range(rounds):
                for way in ways if number % 2 == 0 else reversed(ways):
                    measured[way.name].append(_measure(way, tokenizer, context, tokens, seed))
                    shown.advance(shown.task_ids[0])
        for way in ways:
            found["results"].append({"context": context, "way": way.name} | _summed(measured[way.name], measured[BASE]))
        if report is not None:
            report(table(found, context))
    return found


def table(found: dict[str, Any], context: int) -> str:
    """The results at a context, a line for each way."""
    rows = [row for row in found["results"] if row["context"] == context]
    lines = [f"{context} tokens, {found['model']}, {found['dtype']}, {found['machine']['threads']} threads"]
    for row in rows:
        decode, prefill = row["decode_s"], row["prefill_s"]["median"]
        spread = f"({1e3 * decode['min']:.1f} to {1e3 * decode['max']:.1f})"
        lines.append(
            f"  {row['way']:<32} decode {1e3 * decode['median']:6.1f} ms {spread}, {row['decode_ratio']['median']:5.2f} x; "
            f"prefill {prefill:6.2f} s, {row['prefill_ratio']['median']:5.2f} x; KV {row['kv_bytes'] / 1e6:.1f} MB, "
            f"{row['kv_ratio']:.3f}"
        )
    return "\n".join(lines)


def _ways(model_name: str, model: PreTrainedModel, plan: Plan | None, device: str | None) -> list[Way]:
    other = "float32" if model.dtype == torch.bfloat16 else "bfloat16"
    ways = [
        Way(BASE, model, None),
        Way(f"{BASE}, {other}", headsink.load(model_name, dtype=other, device=device)[0], None),
    ]
    for name, own in (("full", Plan.full(model)), ("plan", plan)):
        if own is not None:
            ways.append(Way(f"headsink, {name}, model.generate", model, own))
            if refusal(model) is None:
                ways.append(Way(f"headsink, {name}", model, own, True))
    return ways


def _measure(way: Way, tokenizer: PreTrainedTokenizerBase, context: int, tokens: int, seed: int) -> dict[str, float]:
    ids = corpus.tokens("prose", tokenizer, context, seed=seed, split="heldout")
    done = generate(
        way.model,
        tokenizer,
        ids,
        way.plan,
        max_new_tokens=tokens,
        compiled=way.compiled,
        min_new_tokens=tokens,  # no token ends the text
    )
    return {"prefill_s": done.first_token_s, "decode_s": statistics.median(done.steps_s), "kv_bytes": done.kv_bytes}


def _summed(own: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("prefill", "decode"):
        times, others = ([row[f"{name}_s"] for row in rows] for rows in (own, base))
        found[f"{name}_s"] = spread(times)
        found[f"{name}_ratio"] = spread([b / a for a, b in zip(times, others, strict=True)])
    found["kv_bytes"] = own[0]["kv_bytes"]
    found["kv_ratio"] = own[0]["kv_bytes"] / base[0]["kv_bytes"]
    return found
