"""Serving by vLLM under a plan and without, asked by OpenAI's own client; to be run where vLLM is (make test-vllm sets it up).

.venv-vllm/bin/python benchmarks/serving.py load --plan plan.json --out benchmarks/results/serving-smollm2.json
.venv-vllm/bin/python benchmarks/serving.py alone --plan plan.json --out benchmarks/results/serving-alone-smollm2.json

load: many clients at once, each with a stream of its own, against stock vLLM as it comes and `headsink serve`, in turn, with
a KV cache of equal size; how long it took, how many texts ran at once, what each client waited for.
alone: many requests of mixed lengths at once into a small KV cache, so that vLLM preempts; then each by itself, without
prefix caching. All outputs must be the same, token by token; where one is not, how near the two tokens were.
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

from headsink.bench.heading import heading
from headsink.data import corpus
from headsink.models import loading
from headsink.serving.vllm import launch
from headsink.utils.files import read_text, write_text
from headsink.utils.statistics import spread

STARTS = 600  # seconds that a server may take to start; the first compiles
POLL = 0.25  # seconds between looks at the server's own figures
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")
PERCENTILES = (50, 90, 99)
PORT = 8123


# servers


class Server:
    """What a server says of itself while it is asked."""

    def __init__(self, log: Path) -> None:
        self.url, self.log = f"http://127.0.0.1:{PORT}", log
        self.seen: dict[str, list[float]] = {name: [] for name in GAUGES}
        self._done = threading.Event()

    def look(self) -> dict[str, float]:
        found = dict.fromkeys(GAUGES, 0.0)
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                for name in GAUGES:
                    if line.startswith(f"vllm:{name}{{"):
                        found[name] += float(line.rsplit(" ", 1)[1])
        return found

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the figures inside the block."""
        self.seen, self._done = {name: [] for name in GAUGES}, threading.Event()

        def watch() -> None:
            while not self._done.wait(POLL):
                for name, value in self.look().items():
                    self.seen[name].append(value)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def summary(self) -> dict[str, float]:
        running = self.seen["num_requests_running"]
        preempted = self.seen["num_preemptions_total"]
        return {
            "most_running": max(running),
            "mean_running": statistics.mean(running),
            "most_kv_used": max(self.seen["kv_cache_usage_perc"]),
            "preemptions": preempted[-1] - preempted[0],
        }


@contextmanager
def started(command: Sequence[str], log: Path, **environment: str) -> Iterator[Server]:
    """A server that answers; it ends with the block."""
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
                    server.look()
                    break
                except OSError:
                    time.sleep(1)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def under_plan(model: str, plan: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "headsink", "serve", model, "--plan", str(plan), *options]


def stock(model: str, *options: str) -> list[str]:
    named = ["--model", loading.find(model)[0], "--served-model-name", model]
    return [sys.executable, "-m", launch.SERVER, *named, *options]


# clients


async def ask(client: AsyncOpenAI, model: str, ids: list[int], tokens: int) -> dict[str, Any]:
    """One request, streamed: its tokens, and when they came (seconds since it was sent)."""
    start, times, got = time.perf_counter(), [], []
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
                got += new
    except Exception as error:  # what a client sees is what is reported
        return {"failed": f"{type(error).__name__}: {error}"}
    if len(got) != tokens:
        return {"failed": f"{len(got)} tokens instead of {tokens}"}
    return {"tokens": got, "first_s": times[0], "all_s": times[-1], "token_s": (times[-1] - times[0]) / (tokens - 1)}


async def ask_all(
    server: Server, model: str, requests: Sequence[tuple[list[int], int]], clients: int
) -> list[dict[str, Any]]:
    """All requests, `clients` at a time, in order."""
    waiting = list(enumerate(requests))[::-1]
    found: list[dict[str, Any]] = [{}] * len(requests)
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=3600) as client:

        async def work() -> None:
            while waiting:
                number, (ids, tokens) = waiting.pop()
                found[number] = await ask(client, model, ids, tokens)

        await asyncio.gather(*(work() for _ in range(clients)))
    return found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of nearest rank."""
    ordered = sorted(values)
    return {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES}


def text(tokenizer: PreTrainedTokenizerBase, number: int, length: int) -> list[int]:
    kind = corpus.DOMAINS[number % len(corpus.DOMAINS)]
    return corpus.tokens(kind, tokenizer, length, seed=number, split="heldout")


# measurements


def load(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt, new = arguments.prompt, arguments.new
    common = ["--dtype", "bfloat16", "--max-model-len", str(prompt + new)]
    ways = {
        "stock": stock(arguments.model, *common),
        "plan": under_plan(arguments.model, arguments.plan, *common),
    }
    ways = {name: ways[name] for name in arguments.ways.split(",")}
    found: dict[str, Any] = {
        "model": arguments.model,
        "plan": json.loads(arguments.plan.read_text())["calibration"],
        "kv_gib": arguments.kv_gib,
        "clients": arguments.clients,
        "requests": arguments.requests,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "options": {"stock": [*common], "plan": [*common, *(f"{k}={v}" for k, v in launch.ON_CPU.items())]},
        "rounds": [],
    }
    if arguments.out.is_file():  # stopped before: what is done is kept, if it was done in the same way
        earlier = json.loads(read_text(arguments.out))
        if all(earlier.get(key) == value for key, value in found.items() if key != "rounds"):
            found["rounds"] = earlier["rounds"]
    done = {(row["round"], row["way"]) for row in found["rounds"]}
    for turn in range(arguments.rounds):
        requests = [(text(tokenizer, 1000 * turn + n, prompt), new) for n in range(arguments.requests)]
        for name in ways if turn % 2 == 0 else reversed(ways):
            if (turn, name) in done:
                continue
            log = arguments.out.with_suffix(f".{name}.log")
            space = {"VLLM_CPU_KVCACHE_SPACE": str(arguments.kv_gib), **launch.environment([])}
            with started(ways[name], log, **space) as server:
                asyncio.run(
                    ask_all(server, arguments.model, [(requests[0][0][:600], 8)], 1)
                )  # what is compiled, is now
                start = time.perf_counter()
                with server.watched():
                    answers = asyncio.run(ask_all(server, arguments.model, requests, arguments.clients))
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
            write_text(arguments.out, json.dumps(heading("serving under load") | found, indent=1) + "\n")
    rows = {name: [row for row in found["rounds"] if row["way"] == name] for name in ways}
    if len(ways) == 2:
        pairs = list(zip(rows["plan"], rows["stock"], strict=True))
        found["throughput_ratio"] = spread([plan["tokens_per_s"] / other["tokens_per_s"] for plan, other in pairs])
        found["running_ratio"] = spread([plan["mean_running"] / other["mean_running"] for plan, other in pairs])
    return found


def alone(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rng = random.Random(0)
    longest = arguments.prompt
    lengths = [round(math.exp(rng.uniform(math.log(20), math.log(longest)))) for _ in range(arguments.requests)]
    requests = [(text(tokenizer, n, length), rng.randint(8, arguments.new)) for n, length in enumerate(lengths)]
    common = ["--dtype", "float32", "--max-model-len", str(longest + arguments.new)]
    ways = {
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
        "options": {name: [*common, *options] for name, (options, _) in ways.items()},
        "clients": arguments.clients,
    }
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, (options, clients) in ways.items():
        log = arguments.out.with_suffix(f".{name}.log")
        space = {"VLLM_CPU_KVCACHE_SPACE": str(arguments.kv_gib), **launch.environment([])}
        with started(under_plan(arguments.model, arguments.plan, *common, *options), log, **space) as server:
            start = time.perf_counter()
            with server.watched():
                answers[name] = asyncio.run(ask_all(server, arguments.model, requests, clients))
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
        for n, (a, b) in enumerate(zip(*([x.get("tokens", []) for x in answers[name]] for name in ways), strict=True))
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
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument(
        "--prompt", type=int, default=3600, help="tokens of a prompt; of the longest, where lengths are mixed"
    )
    parser.add_argument("--new", type=int, default=400, help="tokens to generate; at most, where lengths are mixed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="stock,plan", help="of load; one of them, to see how many texts fit")
    parser.add_argument("--blocks", type=int, default=300, help="of the small KV cache")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(loading.find(arguments.model)[0])
    found = {"load": load, "alone": alone}[arguments.what](arguments, tokenizer)
    above = heading(f"serving: {arguments.what}")
    above["versions"] |= {name: version(name) for name in ("vllm-cpu", "openai")}
    write_text(arguments.out, json.dumps(above | found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in ("rounds", "plan")}, indent=1))


if __name__ == "__main__":
    main()
