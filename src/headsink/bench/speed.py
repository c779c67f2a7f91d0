"""Time to read prompts and time per token, under plans and without, against transformers and peers; all in turn.

Every way reads the same texts, one or several at once, and then continues them greedily. Prefill is the time until every text has
its first token; a decode time is the median of the tokens after that, each one of every text. Ratios are taken within a round, in
which every way runs once, and their median over the rounds is to be quoted. llama.cpp and vLLM, where they are installed, run in
processes of their own (peers.py) and take their turn as the others do.
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
from headsink.bench.peers.process import Failed, timed
from headsink.cache.cache import PlanCache, nbytes
from headsink.data import corpus
from headsink.generation.decode import decode, prepare, refusal
from headsink.models.devices import dtype_name
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply
from headsink.runtime.prefill import CHUNK, empty_cache, prefill
from headsink.utils.progress import bar
from headsink.utils.statistics import spread

BASE = "transformers"  # in the dtype asked for: what ratios are taken to
Texts = list[list[int]]
Run = Callable[[Texts, int], dict[str, Any]]  # texts and tokens to come -> {"times", "kv_bytes"}


class _Clock(BaseStreamer):
    """Notes when tokens arrive, one of every text at once."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # `generate` begins by giving the prompt

    def end(self) -> None:
        """There is nothing left to note."""


@dataclass(frozen=True)
class Way:
    """A way to generate: with which weights, under which plan, by which decode step."""

    name: str
    model: PreTrainedModel
    plan: Plan | None
    compiled: bool = False

    def run(self, texts: Texts, tokens: int) -> dict[str, Any]:
        """Continue texts of one length: {"times": of each token of each text, in seconds, "kv_bytes": at the end}."""
        cache = empty_cache(self.model, self.plan, exact=not self.compiled)
        ids, clock = torch.tensor(texts, device=self.model.device), _Clock()
        options: dict[str, Any] = {"streamer": clock}
        if self.compiled:
            options = {"custom_generate": partial(decode, streamer=clock)}
            prepare(self.model)
        if self.plan is not None and ids.shape[1] > CHUNK:
            options["prefill_chunk_size"] = CHUNK
        start = time.perf_counter()
        if isinstance(cache, PlanCache) and cache.plan.prefill_compression:
            prefill(self.model, cache.plan, ids[:, :-1], cache=cache)
        reading = time.perf_counter() - start
        with nullcontext() if self.plan is None else apply(self.model, self.plan):
            start = (
                time.perf_counter() - reading
            )  # that plan and model belong together is seen to once, not for every text
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_argument(cache),
                max_new_tokens=tokens,
                min_new_tokens=tokens,  # no token ends a text
                do_sample=False,
                **options,
            )
        arrived = [moment - start for moment in clock.times[-tokens:]]
        return {"times": [arrived] * len(texts), "kv_bytes": nbytes(cache)}


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
    """All measurements. Times in seconds, kv_bytes at the end of all texts together.

    batches: how many texts at once. other_weights: plans may be those of other weights of the same shape. llama_cpp, vllm: where
    peers are installed (peers.py). `report` is given the results of each finished context and batch.
    """
    peers.check(llama_cpp, vllm)
    model, tokenizer = headsink.load(model_name, dtype=dtype, device=device)
    if other_weights:
        plans = {name: plan.for_model(model) for name, plan in (plans or {}).items()}
    most = describe(model).max_context
    contexts = contexts_for(most, tokens) if contexts is None else contexts
    check_contexts(contexts, tokens, most)
    others, missing = peers.find(model_name, model, llama_cpp, vllm)
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
        "peers": [{"peer": peer.name, "version": peer.version} for peer in others] + [one.told() for one in missing],
        "tokens": tokens,
        "rounds": rounds,
        "results": [],
    }
    ways = _ways(model_name, model, plans or {}, device)
    runs: dict[str, Run] = {way.name: way.run for way in ways}
    kept = {way.name: way.plan for way in ways if way.plan is not None}
    with ExitStack() as stack:
        for peer in others:
            try:
                process = stack.enter_context(peer.start(max(contexts) + tokens, max(batches), kv_token_bytes(model)))
            except Failed as error:
                _record(found, peer.name, error)
            else:
                runs[peer.name] = partial(_asked, process)
        for batch in batches:
            for name in list(runs):  # what is compiled, is now
                _measure(found, runs, name, texts_of(tokenizer, min(contexts), batch, seed), 3)
        for context in contexts:
            for batch in batches:
                texts = texts_of(tokenizer, context, batch, seed)
                measured: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
                with bar(f"{context} tokens x {batch}", rounds * len(runs), True) as shown:
                    for number in range(rounds):
                        for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
                            if name in runs and (one := _measure(found, runs, name, texts, tokens)):
                                measured[name].append(one)
                            shown.advance(shown.task_ids[0])
                for name in runs:
                    row: dict[str, Any] = {"context": context, "batch": batch, "way": name}
                    row |= {"kept": kept[name].kept(context)} if name in kept else {}
                    found["results"].append(row | _summed(measured[name], measured[BASE]))
                if report is not None:
                    report(table(found, context, batch))
    return found


def texts_of(tokenizer: PreTrainedTokenizerBase, context: int, batch: int, seed: int) -> Texts:
    """Different texts of one length that no plan was made with."""
    return [corpus.tokens("prose", tokenizer, context, seed=seed + n, split="heldout") for n in range(batch)]


def kv_token_bytes(model: PreTrainedModel) -> int:
    """What the KV cache of the model itself takes for a token of one text, layers that slide included."""
    shape = describe(model)
    return int(2 * shape.layers * shape.kv_heads * shape.head_dim * model.dtype.itemsize)


def table(found: dict[str, Any], context: int, batch: int = 1) -> str:
    """The results at a context and a batch, a line for each way."""
    texts = "" if batch == 1 else f" x {batch} texts"
    lines = [f"{context} tokens{texts}, {found['model']}, {found['dtype']}, {found['machine']['threads']} threads"]
    for row in found["results"]:
        if (row["context"], row["batch"]) == (context, batch):
            decode, prefill = row["decode_s"], row["prefill_s"]["median"]
            between = f"({1e3 * decode['min']:.1f} to {1e3 * decode['max']:.1f})"
            kv = (
                "KV not told"
                if row["kv_bytes"] is None
                else f"KV {row['kv_bytes'] / 1e6:.1f} MB, {row['kv_ratio']:.3f}"
            )
            lines.append(
                f"  {row['way']:<32} decode {1e3 * decode['median']:6.1f} ms {between}, {row['decode_ratio']['median']:5.2f} x; "
                f"prefill {prefill:6.2f} s, {row['prefill_ratio']['median']:5.2f} x; {kv}"
            )
    lines += [f"  {one['peer']}: {one['missing']}" for one in found["peers"] if "missing" in one]
    return "\n".join(lines)


def _ways(model_name: str, model: PreTrainedModel, plans: Mapping[str, Plan], device: str | None) -> list[Way]:
    other = "float32" if model.dtype == torch.bfloat16 else "bfloat16"
    ways = [
        Way(BASE, model, None),
        Way(f"{BASE}, {other}", headsink.load(model_name, dtype=other, device=device)[0], None),
    ]
    for name, own in {"full": Plan.full(model), **plans}.items():
        ways.append(Way(f"headsink, {name}, model.generate", model, own))
        if refusal(model) is None:
            ways.append(Way(f"headsink, {name}", model, own, True))
    return ways


def _asked(process: peers.Process, texts: Texts, tokens: int) -> dict[str, Any]:
    return process.ask(ids=texts, tokens=tokens)


def _measure(
    found: dict[str, Any], runs: dict[str, Run], name: str, texts: Texts, tokens: int
) -> dict[str, float] | None:
    """One measurement. A peer that fails is left out from there on, which is recorded."""
    try:
        done = runs[name](texts, tokens)
    except Failed as error:
        _record(found, name, error)
        del runs[name]
        return None
    return timed(done["times"]) | {"kv_bytes": done["kv_bytes"]}


def _record(found: dict[str, Any], peer: str, error: Failed) -> None:
    for one in found["peers"]:
        if one["peer"] == peer:
            one["missing"] = str(error)


def _summed(own: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("prefill", "decode"):
        times, others = ([row[f"{name}_s"] for row in rows] for rows in (own, base))
        found[f"{name}_s"] = spread(times)
        found[f"{name}_ratio"] = spread([b / a for a, b in zip(times, others, strict=True)])
    found["kv_bytes"] = own[0]["kv_bytes"]
    found["kv_ratio"] = own[0]["kv_bytes"] and own[0]["kv_bytes"] / base[0]["kv_bytes"]
    return found
