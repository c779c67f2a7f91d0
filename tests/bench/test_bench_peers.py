"""Speed and memory benchmarks: worker processes, batches, several plans, and missing peers."""

import json
import sys
from pathlib import Path

import pytest
from plans import random_plan

import headsink
from headsink import HeadsinkError
from headsink.bench import memory, speed
from headsink.bench.comparison import Comparison
from headsink.bench.peers import process as peers
from headsink.bench.peers.process import Failed, Process
from headsink.cli.bench.shared import named_plans

pytestmark = pytest.mark.slow

ECHO = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if not request["ids"]:
        sys.exit("/some/where/file.py: no text was given")
    print(json.dumps({"times": [[1.0, 1.5]] * len(request["ids"]), "kv_bytes": 7}), flush=True)
"""


@pytest.fixture
def plans(tiny_folder, tmp_path):
    """Two plans for the tiny model, in files."""
    model = headsink.load(tiny_folder, device="cpu")[0]
    return {name: random_plan(model, seed).save(tmp_path / f"{name}.json") for name, seed in (("a", 1), ("b", 2))}


def echo(*, fails=False):
    return Process("echo", [sys.executable, "-c", "import nothing_like_it" if fails else ECHO], {})


def test_a_worker_answers_until_it_is_closed():
    with echo() as process:
        assert process.ready == {"ready": True}
        for texts in ([[1, 2]], [[1], [2]]):
            assert process.ask(ids=texts, tokens=2) == {"times": [[1.0, 1.5]] * len(texts), "kv_bytes": 7}
        process.forget_peak()
        assert sys.platform != "linux" or process.memory() >= process.memory("VmRSS") > 10**6
    assert process.process.returncode == 0


def test_a_failed_worker_reports_its_last_line_without_folders():
    with pytest.raises(Failed, match="No module named 'nothing_like_it'"):
        echo(fails=True)
    with echo() as process, pytest.raises(Failed, match=r"status 1: file.py: no text was given"):
        process.ask(ids=[], tokens=2)


def test_decode_times_of_a_batch_start_when_every_sequence_has_a_token():
    found = peers.summarize_times([[1.0, 1.5, 4.0, 4.25], [2.0, 2.5, 2.75]])
    assert found["prefill_s"] == 2.0
    assert found["decode_s"] == pytest.approx(
        0.25
    )  # of 0.25, 0.5 and 0.25: the first sequence's tokens before 2.0 do not count


def test_missing_peers_are_reported_with_how_to_install_them(tiny_folder):
    model = headsink.load(tiny_folder, device="cpu")[0]
    found, missing = peers.find(str(tiny_folder), model, None, None)
    if "vllm" not in sys.modules and not found:
        assert {one.name: one.reason for one in missing} == {
            "llama.cpp": "the model is not one .gguf file",
            "vLLM": "not installed",
        }
        assert missing[1].to_dict()["install"] == peers.INSTALL["vLLM"]
    missing = peers.find("smollm2", model, None, None)[1]
    assert missing[0].to_dict() == {
        "peer": "llama.cpp",
        "missing": "not installed",
        "install": peers.INSTALL["llama.cpp"],
    }


def test_a_path_without_a_peer_is_an_error(tmp_path):
    with pytest.raises(HeadsinkError, match=r"^llama-cpp: .* has no node_modules/node-llama-cpp"):
        peers.check(tmp_path, None)
    for python in (tmp_path / "python", Path(sys.executable)):
        with pytest.raises(HeadsinkError, match=r"^vllm: .* is not a Python that has vLLM"):
            peers.check(None, python)


def test_a_peer_that_fails_is_left_out_and_recorded(tiny_folder, monkeypatch):
    class Fails(peers.Peer):
        def start(self, longest, sequences, token_bytes):
            return Process(
                self.name, [sys.executable, "-c", ECHO.replace('not request["ids"]', 'request["tokens"] > 3')], {}
            )

    monkeypatch.setattr(peers, "find", lambda *_: ([Fails("other", "1", (), {})], []))
    found = speed.run(Comparison(str(tiny_folder), contexts=[24], tokens=4, rounds=2, device="cpu"))
    assert found["peers"] == [
        {"peer": "other", "version": "1", "missing": "ended with status 1: file.py: no text was given"}
    ]
    assert "other" not in {row["way"] for row in found["results"]}


def test_a_peer_is_measured_in_every_round(tiny_folder, monkeypatch):
    class Answers(peers.Peer):
        def start(self, longest, sequences, token_bytes):
            assert (longest, sequences) == (28, 2)
            return echo()

    monkeypatch.setattr(peers, "find", lambda *_: ([Answers("other", "1", (), {})], []))
    found = speed.run(Comparison(str(tiny_folder), contexts=[24], batches=[1, 2], tokens=4, rounds=2, device="cpu"))
    mine = [row for row in found["results"] if row["way"] == "other"]
    assert [(row["batch"], row["prefill_s"]["all"], row["decode_s"]["median"]) for row in mine] == [
        (1, [1.0, 1.0], 0.5),
        (2, [1.0, 1.0], 0.5),
    ]
    assert mine[0]["kv_bytes"] == 7


def test_speed_of_batches_under_several_plans(tiny_folder, plans):
    named = named_plans(list(plans.values()))
    found = speed.run(
        Comparison(str(tiny_folder), contexts=[24, 90], batches=[1, 3], tokens=4, rounds=1, plans=named, device="cpu")
    )
    json.dumps(found)
    cases = {(row["context"], row["batch"]): [] for row in found["results"]}
    for row in found["results"]:
        cases[row["context"], row["batch"]].append(row)
    assert list(cases) == [(24, 1), (24, 3), (90, 1), (90, 3)]
    assert {"headsink, a", "headsink, b, model's passes", "headsink, full"} <= {row["way"] for row in cases[24, 3]}
    full = {case: rows[0]["kv_bytes"] for case, rows in cases.items()}
    assert full[90, 3] == 3 * full[90, 1]
    assert all(("kept" in row) == row["way"].startswith("headsink") for row in cases[90, 3])
    assert all((row["kept"] < 1) != ("full" in row["way"]) for row in cases[90, 3] if "kept" in row)
    assert "90 tokens x 3 sequences" in speed.table(found, 90, 3)


def test_memory_of_a_process_for_each_configuration(tiny_folder, plans):
    named = named_plans([plans["a"]])
    found = memory.run(Comparison(str(tiny_folder), contexts=[300], batches=[2], rounds=1, plans=named, device="cpu"))
    json.dumps(found)
    rows = {row["way"]: row for row in found["results"]}
    assert list(rows) == ["transformers", "headsink, full", "headsink, a"]
    config = headsink.load(tiny_folder, device="cpu")[0].config
    head = config.hidden_size // config.num_attention_heads
    assert (
        rows["transformers"]["kv_bytes"]
        == 2 * 303 * config.num_hidden_layers * config.num_key_value_heads * head * 4 * 2
    )
    assert rows["transformers"]["kv_ratio"] == 1
    if sys.platform == "linux":
        assert all(row["peak_bytes"]["median"] >= row["loaded_bytes"]["median"] > 10**8 for row in rows.values())
        assert all(row["peak_ratio"]["min"] > 0.5 for row in rows.values())
    assert "KV" in memory.table(found, 300, 2)


def test_plans_are_named_by_their_budgets_or_their_files(plans, tmp_path):
    assert list(named_plans(list(plans.values()))) == ["a", "b"]
    made = headsink.Plan.load(plans["a"])
    files = [made.model_copy(update={"calibration": {"budget": b}}).save(tmp_path / f"{b}.json") for b in (0.5, 0.25)]
    assert list(named_plans(files)) == ["0.5", "0.25"]
    (tmp_path / "other").mkdir()
    with pytest.raises(HeadsinkError, match=r"^plan: two files are called a.json"):
        named_plans([plans["a"], made.save(tmp_path / "other" / "a.json")])
