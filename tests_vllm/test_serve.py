"""`headsink serve`, started as a user does, with OpenAI's client."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import expected
import pytest
from openai import APIConnectionError, OpenAI
from transformers import AutoTokenizer

from headsink import Pattern, Plan
from headsink.bench import serving


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """Serve the built-in model in float32 with 4 sink tokens and a window of 64: returns an OpenAI client and the plan."""
    plan = Plan.uniform(smollm2[0], Pattern(4, 0, 64))
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "headsink",
        "serve",
        "smollm2",
        "--plan",
        str(plan.save(folder / "plan.json")),
    ]
    options = ["--port", port, "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(1200):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                client.models.list()
                break
            except APIConnectionError:
                time.sleep(0.5)
        yield client, plan
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_the_example_queries_the_server(server):
    client, _ = server
    script = Path(__file__).parent.parent / "examples" / "serve_and_query.py"
    command = [
        sys.executable,
        script,
        "The capital of France is",
        "--url",
        str(client.base_url).rstrip("/"),
        "--tokens",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("The capital of France is ")


def test_concurrent_streams_equal_the_masked_model(server, smollm2):
    client, plan = server
    model, folder = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " ".join(f"Line {n} says {n * n}." for n in range(30))
    assert [found.id for found in client.models.list().data] == ["smollm2"]

    def ask(count):
        parts = client.completions.create(
            model="smollm2",
            prompt=text[: 80 * count],
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        found = [part.choices[0] for part in parts]
        tokens = [token for one in found for token in (one.model_extra or {}).get("token_ids") or ()]
        return "".join(one.text for one in found), tokens

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(1, 7)))
    with expected.masked(model, plan, 32, 512):
        for count, (answer, tokens) in enumerate(answers, 1):
            ids = tokenizer(text[: 80 * count])["input_ids"]
            assert len(tokens) == 12
            assert expected.logprobs(model, ids + tokens)[len(ids) - 1 : -1].argmax(-1).tolist() == tokens
            assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_bench_client_measures_the_server(server, smollm2, tmp_path):
    client, _ = server
    load = serving.Load("smollm2", tmp_path, (2,), 1, 400, 8, 1, ("dense",), 1)
    folder = str(smollm2[1])
    asked = serving.questions(folder, 2, load.prompt)
    row = serving.measure(load, serving.Server(str(client.base_url).removesuffix("/v1/")), folder, 2, asked)
    assert (row["requests"], row["failed"], row["preemptions"]) == (2, 0, 0)
    assert 0 <= row["right"] <= 2
    assert row["most_running"] >= 1
    assert 0 < row["ttft_ms"]["p50"] <= row["e2el_ms"]["p50"] <= 1000 * row["seconds"]
    assert row["tokens_per_s"] > row["new_tokens_per_s"] > 0
    assert "plan" in serving.table({"rows": [row | {"way": "dense"}], "ratios": serving.ratios(load, [])})


def test_a_plan_for_another_model_ends_with_one_line_and_status_2(smollm2, tmp_path):
    plan = Plan.uniform(smollm2[0], Pattern(4, 0, 64))
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"weights": "0" * 64})})
    words = ["-m", "headsink", "serve", "smollm2", "--plan", str(other.save(tmp_path / "plan.json"))]
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert "the plan is for other weights" in found.stderr.splitlines()[-1]
