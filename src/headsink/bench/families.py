"""Time per token of model families: transformers against headsink's compiled decode step, beside what memory allows.

Models have random weights, since time does not depend on them: a stack of a few layers of usual sizes for every family. A token
reads every weight but the embeddings of other tokens and the experts that it does not use; `limit_s` is the time that reading so
many bytes takes, at the bandwidth that is measured in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from headsink.bench.architectures import FAMILIES
from headsink.bench.comparison import BASE
from headsink.bench.heading import provenance
from headsink.bench.limit import read_bandwidth, token_bytes
from headsink.bench.peers.process import summarize_times
from headsink.bench.speed import Configuration
from headsink.decoding.step import refusal
from headsink.models.devices import dtype_name
from headsink.plan.plan import Plan
from headsink.utils.progress import bar
from headsink.utils.statistics import spread

PROMPT = 256  # tokens
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STEP = "headsink"


def run(families: Sequence[str], tokens: int, rounds: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Measure families in turn. Times are in seconds per token."""
    found: dict[str, Any] = provenance("time per token of families with random weights") | {
        "dtype": dtype_name(dtype),
        "prompt": PROMPT,
        "tokens": tokens,
        "rounds": rounds,
        "sizes": SIZES,
        "results": [],
    }
    with bar("families", len(families), True) as shown:
        for name in families:
            found["results"].append({"family": name} | _measure(name, tokens, rounds, dtype, seed))
            shown.advance(shown.task_ids[0])
    return found


def table(found: dict[str, Any]) -> str:
    """Format the results, a line for each family."""
    lines = [
        f"{'family':<18}{'transformers':>14}{'headsink':>12}{'memory allows':>16}   ms per token, {found['dtype']}"
    ]
    for row in found["results"]:
        base, step = (row["decode_s"].get(name) for name in (BASE, STEP))
        end = (
            f"{1e3 * step['median']:10.1f}{1e3 * row['limit_s']:16.1f}   {row['decode_ratio']['median']:.2f} x"
            if step
            else ""
        )
        lines.append(
            f"{row['family']:<18}{1e3 * base['median']:14.1f}  " + (end or f"no compiled step: {row['compiled_step']}")
        )
    return "\n".join(lines)


def make(name: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model of a family with random weights."""
    config_class, options = FAMILIES[name]
    attention = options.get("attention", "sdpa")
    given = SIZES | {key: value for key, value in options.items() if key != "attention"}
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**given)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    return model


def _measure(name: str, tokens: int, rounds: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    model = make(name, dtype, seed)
    reason = refusal(model)
    ways = [Configuration(BASE, model, None)]
    if reason is None:
        ways.append(Configuration(STEP, model, Plan.full(model), True))
    prompts = torch.randint(3, SIZES["vocab_size"], (1, PROMPT)).tolist()
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in ways:
        way.run(prompts, 3)  # warm-up: kernels are compiled here
    for number in range(rounds):
        for way in ways if number % 2 == 0 else list(reversed(ways)):
            times[way.name].append(summarize_times(way.run(prompts, tokens)["times"])["decode_s"])
    bandwidth, bytes_ = read_bandwidth(), token_bytes(model)
    found: dict[str, Any] = {
        "architecture": type(model).__name__,
        "compiled_step": reason or "used",
        "decode_s": {name: spread(own) for name, own in times.items()},
        "token_bytes": bytes_,
        "bandwidth": bandwidth,
        "limit_s": bytes_ / bandwidth,
    }
    if reason is None:
        found["decode_ratio"] = spread([b / a for a, b in zip(times[STEP], times[BASE], strict=True)])
    return found
