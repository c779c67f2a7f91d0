"""TTFT and TPOT, with and without plans, against transformers, llama.cpp and vLLM.

Every configuration reads the same batch of prompts and continues it greedily. Prefill time (TTFT) is the time until every
sequence has its first token. Decode time (TPOT) is the median over the tokens after that, of all sequences. A round runs every
configuration once; ratios are taken within a round. Quote the median ratio over the rounds. llama.cpp and vLLM, if installed,
run in separate processes (peers/process.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import headsink
from headsink.bench.heading import machine, versions
from headsink.bench.options import check_contexts, contexts_for
from headsink.bench.peers import process as peers
from headsink.bench.peers.process import Failed, summarize_times
from headsink.cache.cache import nbytes
from headsink.data import corpus
from headsink.generation.decode import decode, prepare, refusal
from headsink.models.devices import dtype_name
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply
from headsink.runtime.prefill import empty_cache
from headsink.utils.progress import bar
from headsink.utils.statistics import spread

BASE = "transformers"  # the baseline of all ratios, in the requested dtype
Prompts = list[list[int]]  # token ids of a batch, all of one length
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
    """What generates: a model, an optional plan, and whether the compiled decode step runs."""

    name: str
    model: PreTrainedModel
    plan: Plan | None
    compiled: bool = False

    def run(self, prompts: Prompts, tokens: int) -> dict[str, Any]:
        """Generate `tokens` tokens for prompts of one length.

        Returns {"times": seconds from the start to each token of each sequence, "kv_bytes": of the cache at the end}.
        """
        cache = empty_cache(self.model, self.plan, exact=not self.compiled)
        ids, clock = torch.tensor(prompts, device=self.model.device), _Clock()
        options: dict[str, Any] = {"streamer": clock}
        if self.compiled:
            options = {"custom_generate": partial(decode, streamer=clock)}
            prepare(self.model)
        with nullcontext() if self.plan is None else apply(self.model, self.plan):
            # Excludes `apply`, which checks the plan against the model: a user does that once, not for every prompt.
            start = time.perf_counter()
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_argument(cache),
                max_new_tokens=tokens,
                min_new_tokens=tokens,  # no token ends a sequence
                do_sample=False,
                **options,
            )
        times = [moment - start for moment in clock.times[-tokens:]]
        return {"times": [times] * len(prompts), "kv_bytes": nbytes(cache)}


def run(
    model_name: str,
    *,
    contexts: Sequence[int] | None,
    tokens: int,
    rounds: int,
    batches: Sequence[int] = (1,),
    plans: Mapping[str, Plan] | None = None,
    other_weights: bool = False,
    llama_cpp: Path | None = None,
    vllm: Path | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run all measurements. Times are in seconds; kv_bytes is the cache of the whole batch at the end.

    batches: batch sizes. other_weights: accept plans calibrated with other weights of the same shape. llama_cpp, vllm: where the
    peers are installed (peers/process.py). `report` is called with the table of each finished context and batch size.
    """
    peers.check(llama_cpp, vllm)
    model, tokenizer = headsink.load(model_name, dtype=dtype, device=device)
    if other_weights:
        plans = {name: plan.for_model(model) for name, plan in (plans or {}).items()}
    most = describe(model).max_context
    contexts = contexts_for(most, tokens) if contexts is None else contexts
    check_contexts(contexts, tokens, most)
    installed, missing = peers.find(model_name, model, llama_cpp, vllm)
    found: dict[str, Any] = {
        "what": "time to the first token and per token, and bytes of the KV cache",
        "command": "headsink " + " ".join(sys.argv[1:]),
        "versions": versions(),
        "machine": machine(),
        "model": model_name,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
        "compiled_step": refusal(model) or "used",
        "plans": {name: plan.counts() for name, plan in (plans or {}).items()},
        "peers": [{"peer": peer.name, "version": peer.version} for peer in installed]
        + [peer.to_dict() for peer in missing],
        "tokens": tokens,
        "rounds": rounds,
        "results": [],
    }
    configurations = _configurations(model_name, model, plans or {}, device)
    runs: dict[str, Run] = {one.name: one.run for one in configurations}
    plan_of = {one.name: one.plan for one in configurations if one.plan is not None}
    with ExitStack() as stack:
        for peer in installed:
            try:
                process = stack.enter_context(peer.start(max(contexts) + tokens, max(batches), kv_token_bytes(model)))
            except Failed as error:
                _record(found, peer.name, error)
            else:
                runs[peer.name] = partial(_run_peer, process)
        for batch in batches:
            for name in list(runs):  # warm-up: kernels are compiled here
                _measure(found, runs, name, heldout_prompts(tokenizer, min(contexts), batch, seed), 3)
        for context in contexts:
            for batch in batches:
                prompts = heldout_prompts(tokenizer, context, batch, seed)
                measured: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
                with bar(f"{context} tokens x {batch}", rounds * len(runs), True) as shown:
                    for number in range(rounds):
                        for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
                            if name in runs and (one := _measure(found, runs, name, prompts, tokens)):
                                measured[name].append(one)
                            shown.advance(shown.task_ids[0])
                for name in runs:
                    row: dict[str, Any] = {"context": context, "batch": batch, "way": name}
                    row |= {"kept": plan_of[name].kv_budget(context)} if name in plan_of else {}
                    found["results"].append(row | _summary(measured[name], measured[BASE]))
                if report is not None:
                    report(table(found, context, batch))
    return found


def heldout_prompts(tokenizer: PreTrainedTokenizerBase, context: int, batch: int, seed: int) -> Prompts:
    """Return `batch` different prompts of `context` tokens from the held-out split."""
    return [corpus.tokens("prose", tokenizer, context, seed=seed + n, split="heldout") for n in range(batch)]


def kv_token_bytes(model: PreTrainedModel) -> int:
    """Return the bytes that the full KV cache takes per token of one sequence, sliding-window layers counted as full."""
    shape = describe(model)
    return int(2 * shape.layers * shape.kv_heads * shape.head_dim * model.dtype.itemsize)


def table(found: dict[str, Any], context: int, batch: int = 1) -> str:
    """Format the results of one context and batch size, a line for each configuration."""
    sequences = "" if batch == 1 else f" x {batch} sequences"
    lines = [f"{context} tokens{sequences}, {found['model']}, {found['dtype']}, {found['machine']['threads']} threads"]
    for row in found["results"]:
        if (row["context"], row["batch"]) == (context, batch):
            decode, prefill = row["decode_s"], row["prefill_s"]["median"]
            between = f"({1e3 * decode['min']:.1f} to {1e3 * decode['max']:.1f})"
            kv = (
                "KV unknown" if row["kv_bytes"] is None else f"KV {row['kv_bytes'] / 1e6:.1f} MB, {row['kv_ratio']:.3f}"
            )
            lines.append(
                f"  {row['way']:<32} decode {1e3 * decode['median']:6.1f} ms {between}, {row['decode_ratio']['median']:5.2f} x; "
                f"prefill {prefill:6.2f} s, {row['prefill_ratio']['median']:5.2f} x; {kv}"
            )
    lines += [f"  {one['peer']}: {one['missing']}" for one in found["peers"] if "missing" in one]
    return "\n".join(lines)


def _configurations(
    model_name: str, model: PreTrainedModel, plans: Mapping[str, Plan], device: str | None
) -> list[Configuration]:
    other = "float32" if model.dtype == torch.bfloat16 else "bfloat16"
    configurations = [
        Configuration(BASE, model, None),
        Configuration(f"{BASE}, {other}", headsink.load(model_name, dtype=other, device=device)[0], None),
    ]
    for name, plan in {"full": Plan.full(model), **plans}.items():
        configurations.append(Configuration(f"headsink, {name}, model.generate", model, plan))
        if refusal(model, plan) is None:
            configurations.append(Configuration(f"headsink, {name}", model, plan, True))
    return configurations


def _run_peer(process: peers.Process, prompts: Prompts, tokens: int) -> dict[str, Any]:
    return process.ask(ids=prompts, tokens=tokens)


def _measure(
    found: dict[str, Any], runs: dict[str, Run], name: str, prompts: Prompts, tokens: int
) -> dict[str, float] | None:
    """Measure once. A peer that fails is recorded as missing and dropped from all later rounds."""
    try:
        done = runs[name](prompts, tokens)
    except Failed as error:
        _record(found, name, error)
        del runs[name]
        return None
    return summarize_times(done["times"]) | {"kv_bytes": done["kv_bytes"]}


def _record(found: dict[str, Any], peer: str, error: Failed) -> None:
    for one in found["peers"]:
        if one["peer"] == peer:
            one["missing"] = str(error)


def _summary(own: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("prefill", "decode"):
        times, others = ([row[f"{name}_s"] for row in rows] for rows in (own, base))
        found[f"{name}_s"] = spread(times)
        found[f"{name}_ratio"] = spread([b / a for a, b in zip(times, others, strict=True)])
    found["kv_bytes"] = own[0]["kv_bytes"]
    found["kv_ratio"] = own[0]["kv_bytes"] and own[0]["kv_bytes"] / base[0]["kv_bytes"]
    return found
