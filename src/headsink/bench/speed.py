"""TTFT and TPOT, with and without plans, against transformers, llama.cpp and vLLM.

Every configuration reads the same batch of prompts and continues it greedily. Prefill time (TTFT) is the time until every
sequence has its first token. Decode time (TPOT) is the median over the tokens after that, of all sequences. A round runs every
configuration once; ratios are taken within a round. Quote the median ratio over the rounds. `limit_s` is the time that reading
the weights and the cache takes at the bandwidth of memory, measured in the same rounds on a CPU. llama.cpp and vLLM, if
installed, run in separate processes (peers/process.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import headsink
from headsink.attention.formats import KVDtype
from headsink.bench.comparison import BASE, Cases, Comparison, Prompts, format_kv, kv_token_bytes
from headsink.bench.limit import read_bandwidth, token_bytes
from headsink.bench.peers import process as peers
from headsink.bench.peers.process import Failed, summarize_times
from headsink.cache.cache import nbytes
from headsink.decoding.step import prepare, refusal
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply
from headsink.runtime.prefill import empty_cache
from headsink.utils.progress import bar
from headsink.utils.statistics import spread

Run = Callable[[Prompts, int], dict[str, Any]]  # prompts and number of new tokens -> {"times", "kv_bytes"}


class _Clock(BaseStreamer):
    """Record when tokens arrive; each call brings one token of every sequence."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the first call of `generate` passes the prompt

    def end(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Configuration:
    """What generates: a model, an optional plan, whether the compiled decode step runs, and the dtype of the plan's cache."""

    name: str
    model: PreTrainedModel
    plan: Plan | None
    compiled: bool = False
    kv_dtype: KVDtype = "auto"

    def run(self, prompts: Prompts, tokens: int) -> dict[str, Any]:
        """Generate `tokens` tokens for prompts of one length.

        Returns {"times": seconds from the start to each token of each sequence, "kv_bytes": of the cache at the end}.
        """
        cache = empty_cache(self.model, self.plan, exact=not self.compiled, kv_dtype=self.kv_dtype)
        ids, clock = torch.tensor(prompts, device=self.model.device), _Clock()
        if self.compiled:
            prepare(self.model, self.kv_dtype)
        with nullcontext() if self.plan is None else apply(self.model, self.plan, compiled=self.compiled):
            # Excludes `apply`, which checks the plan against the model: a user does that once, not for every prompt.
            start = time.perf_counter()
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_argument(cache),
                max_new_tokens=tokens,
                min_new_tokens=tokens,  # no token ends a sequence
                do_sample=False,
                streamer=clock,
            )
        times = [moment - start for moment in clock.times[-tokens:]]
        return {"times": [times] * len(prompts), "kv_bytes": nbytes(cache)}


def run(options: Comparison) -> dict[str, Any]:
    """Run all measurements. Times are in seconds; kv_bytes is the cache of the whole batch at the end."""
    cases = Cases(options, "time to the first token and per token, and bytes of the KV cache")
    options, found, model = cases.options, cases.found, cases.model
    found["compiled_step"] = refusal(model) or "used"
    configurations = _configurations(options, model)
    runs: dict[str, Run] = {one.name: one.run for one in configurations}
    plan_of = {one.name: one.plan for one in configurations if one.plan is not None}
    weights = {one.name: token_bytes(one.model) for one in configurations}
    longest, most = max(cases.contexts) + options.tokens, max(options.batches)
    with ExitStack() as stack:
        for peer in cases.installed:
            try:
                process = stack.enter_context(peer.start(longest, most, kv_token_bytes(model)))
            except Failed as error:
                cases.lose(peer.name, error)
            else:
                runs[peer.name] = partial(_run_peer, process)
        for batch in options.batches:
            for name in list(runs):  # warm-up: kernels are compiled here
                _measure(cases, runs, name, cases.prompts(min(cases.contexts), batch), 3)
        for context, batch, prompts in cases:
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
            bandwidth = list[float]()
            with bar(f"{context} tokens x {batch}", options.rounds * len(runs), True) as shown:
                for number in range(options.rounds):
                    bandwidth += [read_bandwidth()] if model.device.type == "cpu" else []
                    for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
                        if name in runs and (one := _measure(cases, runs, name, prompts, options.tokens)):
                            measured[name].append(one)
                        shown.advance(shown.task_ids[0])
            found_now = {name: _summary(measured[name], measured[BASE]) for name in runs}
            for name in weights.keys() & found_now.keys() if bandwidth else ():
                found_now[name]["limit_s"] = (weights[name] + found_now[name]["kv_bytes"]) / max(bandwidth)
            cases.add(context, batch, found_now, plan_of, table)
    return found


def table(found: dict[str, Any], context: int, batch: int = 1) -> str:
    """Format the results of one context and batch size, a line for each configuration."""
    sequences = "" if batch == 1 else f" x {batch} sequences"
    lines = [f"{context} tokens{sequences}, {found['model']}, {found['dtype']}, {found['machine']['threads']} threads"]
    for row in found["results"]:
        if (row["context"], row["batch"]) == (context, batch):
            decode, prefill = row["decode_s"], row["prefill_s"]["median"]
            between = f"({1e3 * decode['min']:.1f} to {1e3 * decode['max']:.1f})"
            if "limit_s" in row:
                between += f", memory allows {1e3 * row['limit_s']:.1f}"
            lines.append(
                f"  {row['way']:<32} decode {1e3 * decode['median']:6.1f} ms {between}, {row['decode_ratio']['median']:5.2f} x; "
                f"prefill {prefill:6.2f} s, {row['prefill_ratio']['median']:5.2f} x; {format_kv(row)}"
            )
    lines += [f"  {one['peer']}: {one['missing']}" for one in found["peers"] if "missing" in one]
    return "\n".join(lines)


def _configurations(options: Comparison, model: PreTrainedModel) -> list[Configuration]:
    other = "float32" if model.dtype == torch.bfloat16 else "bfloat16"
    configurations = [
        Configuration(BASE, model, None),
        Configuration(
            f"{BASE}, {other}", headsink.load(options.model_name, dtype=other, device=options.device)[0], None
        ),
    ]
    for name, plan in {"full": Plan.full(model), **options.plans}.items():
        configurations.append(Configuration(f"headsink, {name}, model's passes", model, plan))
        if refusal(model, plan) is None:
            for kv_dtype in options.kv_dtypes:
                suffix = "" if kv_dtype == "auto" else f", {kv_dtype}"
                configurations.append(Configuration(f"headsink, {name}{suffix}", model, plan, True, kv_dtype))
    return configurations


def _run_peer(process: peers.Process, prompts: Prompts, tokens: int) -> dict[str, Any]:
    return process.ask(ids=prompts, tokens=tokens)


def _measure(cases: Cases, runs: dict[str, Run], name: str, prompts: Prompts, tokens: int) -> dict[str, float] | None:
    """Measure once. A peer that fails is recorded as missing and dropped from all later rounds."""
    try:
        done = runs[name](prompts, tokens)
    except Failed as error:
        cases.lose(name, error)
        del runs[name]
        return None
    return summarize_times(done["times"]) | {"kv_bytes": done["kv_bytes"]}


def _summary(own: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("prefill", "decode"):
        times, others = ([row[f"{name}_s"] for row in rows] for rows in (own, base))
        found[f"{name}_s"] = spread(times)
        found[f"{name}_ratio"] = spread([b / a for a, b in zip(times, others, strict=True)])
    found["kv_bytes"] = own[0]["kv_bytes"]
    found["kv_ratio"] = own[0]["kv_bytes"] and own[0]["kv_bytes"] / base[0]["kv_bytes"]
    return found
