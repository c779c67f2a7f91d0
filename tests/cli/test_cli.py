"""The command line, as a user types it, on a tiny model."""

import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import tiny
from plans import random_plan

import headsink
from headsink.bench.options import contexts_for
from headsink.cli import doctor, generate, loading, main
from headsink.cli.ablate import strongest_heads
from headsink.errors import HeadsinkError
from headsink.models import builtin, timing
from headsink.models.builtin import check_name
from headsink.plan.packaged import packaged_plan
from headsink.plan.plan import Plan
from headsink.utils import files, versions


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words, stdin=None):
        monkeypatch.setattr(sys, "argv", ["headsink", *map(str, words)])
        if stdin is not None:
            read, write = os.pipe()
            os.write(write, stdin.encode())
            os.close(write)
            monkeypatch.setattr(sys, "stdin", os.fdopen(read))
        with pytest.raises(SystemExit) as stop:
            main.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def census(run, tiny_folder, tmp_path):
    def census(name, *words):
        status, out, err = run(
            *("analyze", tiny_folder, "--out", tmp_path / name, "--device", "cpu", "--json"),
            *(words if "--prompts" in words or "--rerun" in words else ("--lengths", "32,200", *words)),
        )
        assert status == 0, err
        return tmp_path / name, json.loads(out)

    return census


@pytest.mark.slow
def test_analyze_writes_the_folder(census):
    folder, found = census("a")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"census.json", "heads.parquet", "arrays.safetensors", "tokens.json", "report.html"}
    assert {path.suffix for path in folder.glob("figure-*")} == {".png", ".svg"}
    assert [path.name for path in folder.parent.iterdir()] == ["a"]  # no checkpoint remains
    assert sum(found["roles"]["200"].values()) == 3 * 4
    assert len(found["first_question"]["200"]) == 4
    assert found["drawing_tokens"][0]["token"]
    assert len(found["tau"]["evidence"]) == 10
    assert len(found["settings"]["texts"]) == 12
    page = (folder / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "").split("</head>\n<body>")[1]


@pytest.mark.slow
def test_analyze_draws_chosen_heads_and_marks_a_plan(run, tiny_folder, tmp_path):
    plan = random_plan(headsink.load(tiny_folder, dtype="float32")[0], 0).save(tmp_path / "plan.json")
    words = ("analyze", tiny_folder, "--lengths", "64", "--domains", "prose", "--dtype", "float32", "--device", "cpu")
    status, _, err = run(*words, "--maps", "2.1,0.3", "--plan", plan, "--out", tmp_path / "a")
    assert status == 0, err
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<canvas" in page
    assert 'href="#?layer=2&amp;head=1"' in page
    assert 'class="kept-said"' in page
    assert run(*words, "--maps", "none", "--out", tmp_path / "b")[0] == 0
    assert "<canvas" not in (tmp_path / "b" / "report.html").read_text()
    status, _, err = run(*words, "--maps", "none", "--plan", plan, "--out", tmp_path / "c")
    assert (status, err) == (2, "headsink: plan: attention maps mark it; leave out --maps none and --tensor-parallel\n")


@pytest.mark.slow
def test_rerunning_analyze_replaces_only_the_census(census, run, tiny_folder, tmp_path):
    _, first = census("a")
    _, again = census("a")
    assert again == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    status, out, err = run("analyze", tiny_folder, "--out", tmp_path / "mine", "--lengths", "32")
    assert (status, out) == (2, "")
    assert "holds other files" in err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_compare_prints_the_differences(census, run):
    (a, _), (b, _), (c, _) = census("a"), census("b", "--seed", "1"), census("c", "--domains", "maths")
    status, out, _ = run("compare", a, b, "--json")
    found = json.loads(out)
    assert status == 0
    assert set(found["settings"]) == {"texts", "seed"}
    assert len(found["scores"]) == 7 * 2 * (6 + 1)  # scores, lengths, domains and all together
    assert all(abs(row["mean_difference"]) <= 1 for row in found["scores"] if row["score"] in ("sink", "local", "far"))
    same = json.loads(run("compare", a, a, "--json")[1])
    assert same["settings"] == {}
    assert same["changed"] == []
    assert all(row["largest_difference"] == 0 for row in same["scores"])
    assert {tuple(row["domains"]) for row in json.loads(run("compare", a, c, "--json")[1])["scores"]} == {
        ("maths", "maths")
    }
    assert run("compare", a, b)[0] == 0
    report = a.parent / "comparison.html"
    assert json.loads(run("compare", f"{a}@32", f"{a}@200", "--out", report, "--json")[1])["report"] == str(report)
    assert "<html" in report.read_text()
    assert run("compare", a, b, "--figures", a.parent / "figures")[0] == 0
    assert {path.suffix for path in (a.parent / "figures").iterdir()} == {".png", ".svg", ".json"}


@pytest.mark.slow
def test_ablate_takes_heads_by_name_or_from_a_census(census, run, tiny_folder):
    folder, _ = census("a")
    words = ("ablate", tiny_folder, "--device", "cpu", "--context", "512", "--draws", "2", "--pattern", "2+4k+9")
    status, out, _ = run(*words, "--census", folder, "--strongest", "3", "--score", "far", "--json")
    found = json.loads(out)
    assert status == 0
    strongest = headsink.Census.load(folder).strongest("far", 3)
    assert found["cost"]["heads"] == ",".join(f"{layer}.{head}" for layer, head in sorted(strongest))
    assert found["pattern"] == "2+4k+9"
    status, out, _ = run(*words, "--heads", found["cost"]["heads"])
    assert status == 0
    assert f"delta NLL {found['cost']['delta_nll']:+.4f}" in out
    assert f"{found['cost']['right']} of {found['asked']} right" in out
    assert "2 random sets of the same layers" in out
    assert run(*words, "--census", folder, "--score", "shrink")[0] == 2
    with pytest.raises(HeadsinkError, match="is of another model"):
        strongest_heads(folder, tiny("llama", layers=2), "far", 3)


@pytest.mark.slow
def test_incomparable_runs_are_refused(census, run, tmp_path):
    (a, _), (b, _) = census("a", "--domains", "prose"), census("b", "--domains", "maths")
    status, _, err = run("compare", a, b)
    assert status == 2
    assert "no kind of text in common" in err
    right = re.search(r"name both, as in (\S+) (\S+)\n", err)
    assert right[1].endswith(":prose")
    assert right[2].endswith(":maths")
    assert run("compare", *right.groups(), "--json")[0] == 0
    short, _ = census("short", "--domains", "prose", "--lengths", "64")
    status, _, err = run("compare", a, short)
    assert status == 2
    assert f"no length in common; name both, as in {a}@200 {short}@64" in err
    assert run("compare", f"{a}@200", f"{short}@64", "--json")[0] == 0
    status, _, err = run("compare", a, tmp_path / "nothing")
    assert status == 2
    assert "nothing: no such folder" in err


@pytest.mark.slow
def test_analyze_on_texts_of_the_user(census, run, tiny_folder, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("<script>alert('x')</script> & so on " * 60)
    folder, found = census("a", "--text", own)
    assert [text["domain"] for text in found["settings"]["texts"]] == ["own"]
    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page.split("</head>\n<body>")[1]
    own.write_text("too short")
    status, _, err = run("analyze", tiny_folder, "--text", own, "--lengths", "200", "--out", tmp_path / "b")
    assert status == 2
    assert "fewer than the shortest length" in err


@pytest.mark.slow
def test_analyze_on_prompts_of_the_user(census, run, tiny_folder, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text(
        "once upon a time there was a fox\n\n<script>alert('x')</script> and what is after it, and so on\n"
    )
    records = tmp_path / "prompts.jsonl"
    records.write_text('{"prompt": "def f(x): return x + 1", "domain": "code"}\n{"text": "one and one is two"}\n')
    _, found = census("a", "--prompts", lines, "--prompts", records, "--prompt", "hello there, how are you?")
    assert [text["domain"] for text in found["settings"]["texts"]] == ["own", "own", "own", "own", "code"]
    shortest = min(text["tokens"] for text in found["settings"]["texts"])
    assert found["settings"]["lengths"][0] == shortest
    records.write_text('{"prompt": "fine"}\n{"question": "what?"}\n')
    status, _, err = run("analyze", tiny_folder, "--prompts", records, "--out", tmp_path / "b")
    assert status == 2
    assert f"line 2 of {records} has no text" in err


@pytest.mark.slow
def test_a_census_is_rerun_from_its_folder(census):
    (a, first), (_, again) = census("a", "--seed", "3", "--domains", "maths,random", "--tau", "0.5"), ({}, {})
    _, again = census("b", "--rerun", a)
    assert {**again, "folder": ""} == {**first, "folder": ""}


@pytest.mark.slow
def test_plan_draws_the_frontier(run, tiny_folder, tmp_path):
    words = ("--context", "600", "--budgets", "0.0001,0.3,0.6", "--device", "cpu")
    status, out, err = run("plan", tiny_folder, *words, "--frontier", tmp_path / "f", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [point["budget"] for point in found["points"]] == [0.3, 0.6]  # a budget below the smallest plan is left out
    assert found["advice"] == json.loads((tmp_path / "f" / "frontier.json").read_text())["advice"]
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert names == {
        "frontier.json",
        "frontier.html",
        "frontier.png",
        "frontier.svg",
        "plan-0300.json",
        "plan-0600.json",
    }
    assert Plan.load(tmp_path / "f" / "plan-0300.json").kv_budget(600) <= 0.3
    assert "http" not in (tmp_path / "f" / "frontier.svg").read_text().replace("http://www.w3.org", "")


@pytest.mark.slow
def test_a_plan_within_a_maximum_kl(run, tiny_folder, tmp_path):
    words = ("--context", "600", "--quality", "none", "--device", "cpu", "--out", tmp_path / "plan.json", "--json")
    status, out, err = run("plan", tiny_folder, *words, "--no-top-k", "--max-kl", "0.5")
    assert status == 0, err
    calibration = json.loads(out)["calibration"]
    assert calibration["criterion"] == {"max_kl": 0.5}
    assert calibration["verified"]["kl_text"] <= 0.5


@pytest.mark.slow
def test_a_plan_without_a_budget_says_why_it_has_its_budget(run, tiny_folder, tmp_path):
    words = ("--context", "600", "--quality", "512", "--device", "cpu", "--out", tmp_path / "plan.json", "--no-top-k")
    status, _, err = run("plan", tiny_folder, *words)
    assert status == 0, err
    made = Plan.load(tmp_path / "plan.json")
    assert made.calibration["criterion"] == {"delta_nll": 0.01, "answers": "all"}
    assert err.splitlines()[-1].startswith(
        f"{made.calibration['budget']:.1%} of the KV cache is the smallest budget without visible"
    )
    assert made.quality
    status, _, err = run(
        "generate", tiny_folder, "--prompt", "a box " * 200, "--plan", tmp_path / "plan.json", "--max-new-tokens", "5"
    )
    assert status == 0, err
    status, _, err = run("plan", tiny_folder, *words, "--budget", "0.5", "--max-kl", "0.1")
    assert status == 2
    assert "one of the two" in err


@pytest.mark.slow
def test_plan_then_generate(run, tiny_folder, tmp_path):
    path = tmp_path / "plan.json"
    words = ("--budget", "0.3", "--context", "600", "--quality", "512", "--domains", "maths,qa", "--device", "cpu")
    status, out, err = run("plan", tiny_folder, *words, "--out", path, "--json")
    assert status == 0, err
    made = Plan.load(path)
    assert json.loads(out)["file"] == str(path)
    assert made.kv_budget(600) <= 0.3
    assert [document["text"] for document in made.calibration["documents"]] == ["maths", "qa"] * 2
    assert made.quality[0].context == 512
    assert made.quality[0].kv_bytes < made.quality[0].kv_bytes_full
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]  # no checkpoint remains

    prompt = (
        "generate",
        tiny_folder,
        "--prompt",
        "once upon a time " * 100,
        "--max-new-tokens",
        "5",
        "--device",
        "cpu",
    )
    full = json.loads(run(*prompt, "--json")[1])
    kept = json.loads(run(*prompt, "--json", "--plan", path)[1])
    assert full["prompt_tokens"] == kept["prompt_tokens"] > 300
    assert kept["kv_bytes"] < full["kv_bytes"]
    assert full["new_tokens"] <= 5
    status, out, err = run(*prompt)
    assert status == 0
    assert full["text"] in out
    assert "KV cache" in err


@pytest.mark.slow
@pytest.mark.parametrize("raw", [(), ("--raw",)])
@pytest.mark.parametrize("way", [(), ("--reconstruct",)])
def test_a_document_is_prefilled_once_for_many_questions(way, raw, run, tiny_folder, tmp_path):
    """The file holds what `compress` keeps of the document, and every question is read after it."""
    model, _ = headsink.load(tiny_folder, device="cpu", dtype="float32")
    plan = random_plan(model, 2).model_copy(update={"reconstruction_prompt": (7, 8, 9)})
    plan.save(tmp_path / "plan.json")
    (tmp_path / "box.txt").write_text("There is a box. " * 60 + "It is red.")
    usual = ("--device", "cpu", "--dtype", "float32", "--json")
    words = (
        "prefill",
        tiny_folder,
        "--plan",
        tmp_path / "plan.json",
        "--file",
        tmp_path / "box.txt",
        *raw,
        *way,
        *usual,
    )
    status, out, err = run(*words, "--out", tmp_path / "box.kv")
    assert status == 0, err
    found = json.loads(out)
    assert found["prompt_tokens"] > 200
    assert found["file"] == str(tmp_path / "box.kv")
    for question in ("What is in the box?", "Is it red?"):
        ask = ("generate", tiny_folder, "--prompt", question, "--max-new-tokens", "6", *usual)
        status, out, err = run(*ask, "--prefix", tmp_path / "box.kv")
        assert status == 0, err
        kept = json.loads(out)
        whole = ("--file", tmp_path / "box.txt", "--plan", tmp_path / "plan.json", *raw)
        status, out, err = run(*ask, *whole)
        together = json.loads(out)
        assert kept["prompt_tokens"] == together["prompt_tokens"] > found["prompt_tokens"]
    cache, ids = headsink.load_prefix(tmp_path / "box.kv", model)
    logits = []
    for one in (cache, headsink.compress(model, plan, ids, reconstruct=bool(way))):
        with headsink.apply(model, plan), torch.no_grad():
            logits.append(model(ids[:, :9], past_key_values=one).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert kept["prefix"] == str(tmp_path / "box.kv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["box.kv", "box.txt", "plan.json"]
    status, out, err = run("generate", tiny_folder, "--prefix", tmp_path / "box.kv", "--prompt", "x", *whole)
    assert (status, out) == (2, "")
    assert "prefix: it has a plan, a document and a format of its own" in err


def test_chat_uses_one_cache(run, tiny_folder):
    words = ("chat", tiny_folder, "--max-new-tokens", "4", "--device", "cpu")
    status, out, _ = run(*words, "--json", stdin="hello there\nand then?\n\nnot read\n")
    turns = json.loads(out)["turns"]
    assert status == 0
    assert [turn["question"] for turn in turns] == ["hello there", "and then?"]
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"] + turns[0]["new_tokens"]
    assert run(*words, stdin="hi\n")[0] == 0


@pytest.mark.slow
def test_a_budget_needs_no_plan_file(run, tmp_path, monkeypatch):
    tokens = []  # of prompt and answer, to which the plan is scaled
    monkeypatch.setattr(generate, "packaged_plan", lambda *given: tokens.append(given[2]) or packaged_plan(*given))
    text = "The lighthouse keeper counted ships. On Monday there were seven of them, and on Tuesday none came by. " * 9
    (tmp_path / "text.txt").write_text(text)
    words = ("smollm2", "--budget", "0.25", "--file", tmp_path / "text.txt", "--device", "cpu", "--json")
    status, out, err = run("generate", *words, "--prompt", "How many?", "--max-new-tokens", "4")
    found = json.loads(out)
    assert (status, found["budget"], found["plan"]) == (0, 0.25, None), err
    assert tokens == [found["prompt_tokens"] + 4]
    token = 2 * 30 * 3 * 64 * 4  # bytes in float32
    assert found["kv_bytes"] < 0.5 * found["prompt_tokens"] * token  # buffers of short texts have spare room
    for how in (("--prefill", "sparse"), ("--chunk-size", "64")):
        assert run("generate", *words, "--prompt", "How many?", "--max-new-tokens", "4", *how)[0] == 0
    status, out, err = run("prefill", *words, "--out", tmp_path / "text.kv")
    assert (status, json.loads(out)["budget"]) == (0, 0.25), err
    assert json.loads(out)["kv_bytes"] < 0.5 * json.loads(out)["prompt_tokens"] * token
    words = ("smollm2", "--prefix", tmp_path / "text.kv", "--prompt", "How many?", "--max-new-tokens", "4")
    assert run("generate", *words, "--device", "cpu")[0] == 0
    assert run("chat", "smollm2", "--budget", "0.5", "--max-new-tokens", "2", "--device", "cpu", stdin="hi\n")[0] == 0


@pytest.mark.slow
def test_bench_speed(run, tiny_folder, tmp_path):
    model = headsink.load(tiny_folder, device="cpu")[0]
    random_plan(model, 1).save(tmp_path / "plan.json")
    words = ["bench", "speed", tiny_folder, "--device", "cpu", "--contexts", "24,90", "--tokens", "4", "--rounds", "2"]
    words += ["--plan", tmp_path / "plan.json", "--out", tmp_path / "speed.json"]
    status, out, err = run(*words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert json.loads((tmp_path / "speed.json").read_text()) == found
    ways = [row["way"] for row in found["results"] if row["context"] == 24]
    assert ways == [row["way"] for row in found["results"] if row["context"] == 90]
    assert [way.split(", ")[0] for way in ways] == ["transformers"] * 2 + ["headsink"] * 4
    for row in found["results"]:
        assert len(row["decode_s"]["all"]) == len(row["prefill_ratio"]["all"]) == 2
        assert row["decode_s"]["min"] <= row["decode_s"]["median"] <= row["decode_s"]["max"]
    base = [row for row in found["results"] if row["way"] == "transformers"]
    assert all(row["decode_ratio"]["all"] == [1, 1] and row["kv_ratio"] == 1 for row in base)
    assert base[1]["kv_bytes"] == 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * 93 * 4 * (
        model.config.hidden_size // model.config.num_attention_heads
    )
    assert "90 tokens" in run(*words)[1]


def test_models_and_doctor(run):
    assert json.loads(run("models", "--json")[1])["built_in"][0]["installed"] is True
    found = json.loads(run("doctor", "--json", "--device", "cpu")[1])
    assert found["attention"]["right"]
    assert found["packages"]["torch"]
    assert run("models")[0] == run("doctor", "--device", "cpu")[0] == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["generate", "TINY", "--prompt", "  "], "prompt: it is empty"),
        (["generate", "TINY", "--prompt", "x " * 4000], "over the model's maximum of 2048"),
        (["generate", "TINY", "--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["generate", "TINY", "--prompt", "x", "--plan", "nosuch.json"], "cannot read plan nosuch.json: No such file"),
        (["generate", "TINY", "--file", "nosuch.txt"], "cannot read nosuch.txt: No such file"),
        (["generate", "TINY", "--prefix", "nosuch.kv", "--prompt", "x"], "cannot read nosuch.kv: No such file"),
        (["generate", "TINY", "--prefix", "file", "--prompt", "x"], "file: not a prefix that headsink has"),
        (
            ["generate", "TINY", "--prompt", "x", "--lossless", "--prefix", "file"],
            "lossless: it needs every key of the text",
        ),
        (["prefill", "TINY", "--file", "file"], "plan: give --plan FILE, or --budget for a plan that comes with"),
        (["generate", "TINY", "--prompt", "x", "--budget", "0.25"], "the package has plans for smollm2 only"),
        (["generate", "smollm2", "--prompt", "x", "--budget", "0.3"], "0.3 is not packaged for smollm2; one of 0.125"),
        (["chat", "smollm2", "--budget", "0.25", "--plan", "PLAN"], "give --plan FILE or --budget, one of the two"),
        (["generate", "TINY", "--prompt", "x", "--prefill", "thin"], "prefill: 'thin' is neither 'dense' nor 'sparse'"),
        (
            ["generate", "TINY", "--prompt", "x", "--prefill", "sparse"],
            "prefill: --prefill sparse and --chunk-size need",
        ),
        (["generate", "TINY", "--prompt", "x", "--plan", "PLAN", "--chunk-size", "0"], "chunk-size"),
        (
            ["generate", "TINY", "--prompt", "x", "--plan", "PLAN", "--chunk-size", "9", "--prefill", "sparse"],
            "chunk-size: sparse prefill evicts at every token; leave chunk-size out",
        ),
        (["prefill", "TINY", "--file", "file", "--plan", "nosuch.json"], "cannot read plan nosuch.json: No such"),
        (["generate", "TINY", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["plan", "TINY", "--budget", "0"], "outside (0, 1]"),
        (["plan", "TINY", "--budget", "1.5"], "outside (0, 1]"),
        (["plan", "TINY", "--budget", "0.0001"], "less than the smallest plan"),
        (["plan", "TINY", "--context", "100000"], "model's maximum"),
        (["plan", "TINY", "--domains", "code,random"], "domains: 'random' given; one or more of prose, code"),
        (["plan", "TINY", "--out", "."], "it is a folder"),
        (["plan", "TINY", "--out", "file"], "cannot write file: headsink did not write the file that is there"),
        (["plan", "TINY", "--out", "/dev/null", "--force"], "cannot write /dev/null: it is a device, name a file"),
        (["prefill", "TINY", "--plan", "PLAN", "--out", "file"], "headsink did not write the file that is there"),
        (["compare", "a", "b", "--out", "file"], "headsink did not write the file that is there"),
        (["bench", "speed", "TINY", "--out", "file"], "headsink did not write the file that is there"),
        (["plan", "TINY", "--budget", "0.2", "--max-kl", "0.1"], "one of the two"),
        (["plan", "TINY", "--max-kl", "0"], "max-kl: 0.0 is not above 0"),
        (["plan", "TINY", "--context", "long"], "neither a number of tokens nor a range"),
        (["plan", "TINY", "--context", "900-700"], "context: 900 to 700 is not a range"),
        (["plan", "TINY", "--policy", "best"], "policy: 'best' is unknown; one of headsink, streaming-llm"),
        (["plan", "TINY", "--positions", "here"], "positions: 'here' is neither absolute nor cache-relative"),
        (["plan", "TINY", "--positions", "cache-relative"], "positions: cache-relative positions need the policy"),
        (["plan", "TINY", "--frontier", "file"], "it is a file"),
        (["plan", "TINY", "--frontier", "new", "--budgets", "a,b"], "not a list of numbers"),
        (["plan", "TINY", "--frontier", "new", "--budget", "0.5"], "frontier: it takes --budgets, not --budget"),
        (["plan", "TINY", "--frontier", "new", "--quality", "600"], "frontier: it takes --budgets, not --budget"),
        (["plan", "TINY", "--budgets", "0.5,0.25"], "budgets: they are those of --frontier FOLDER"),
        (["chat", "smollm2", "--budget", "2"], "budget: 2.0 is outside (0, 1]"),
        (["plan", "TINY", "--frontier", "new", "--budgets", "0.5,2"], "outside (0, 1]"),
        (["analyze", "TINY", "--lengths", "100000", "--out", "new"], "over the model's maximum of 2048"),
        (["analyze", "TINY", "--lengths", "1", "--out", "new"], "too short"),
        (["analyze", "TINY", "--maps", "3", "--out", "new"], "maps: '3' is not auto, none, or heads as in 3.2,10.4"),
        (["analyze", "TINY", "--maps", "9.0", "--out", "new"], "heads: 9.0 is not a head of LlamaForCausalLM"),
        (["analyze", "TINY", "--plan", "nosuch.json", "--out", "new"], "cannot read plan nosuch.json"),
        (["analyze", "TINY", "--lengths", "many", "--out", "new"], "not a list of whole numbers"),
        (
            ["analyze", "TINY", "--domains", "poems", "--lengths", "32", "--out", "new"],
            "domains: 'poems' given; one or more",
        ),
        (["analyze", "TINY", "--dtype", "int3", "--out", "new"], "dtype: 'int3' is unknown"),
        (["analyze", "TINY", "--tau", "2", "--out", "new"], "tau: 2.0 is outside (0, 1]"),
        (["analyze", "TINY", "--queries", "1", "--out", "new"], "queries"),
        (["analyze", "TINY", "--prompt", " ", "--out", "new"], "prompt: one of them is empty"),
        (["analyze", "TINY", "--prompts", "nosuch", "--out", "new"], "cannot read nosuch: No such file"),
        (["analyze", "TINY", "--max-memory", "lots", "--out", "new"], "max-memory: 'lots' is not of the form"),
        (["analyze", "TINY", "--tensor-parallel", "--out", "new"], "torchrun"),
        (["analyze", "--rerun", "nosuch", "--out", "new"], "nosuch: no such folder"),
        (["analyze", "nosuch", "--out", "new"], "unknown model"),
        (["analyze", "TINY", "--out", "file"], "it is a file"),
        (["compare", "a", "b", "--out", "."], "it is a folder"),
        (["compare", "a", "b", "--out", "file/c.html"], "cannot write file/c.html"),
        (["ablate", "TINY"], "heads: give --heads, such as 3.2,5.*, or --census FOLDER, one of the two"),
        (["ablate", "TINY", "--heads", "0.9"], "heads: 0.9 is not there; layer 0 has 4 query heads, from 0"),
        (
            ["ablate", "TINY", "--heads", "0.1", "--context", "5000"],
            "context: 5000 is over the model's maximum of 2048",
        ),
        (["ablate", "TINY", "--heads", "0.1", "--census", "."], "one of the two"),
        (["ablate", "TINY", "--census", "."], ".: not a census folder: it has no census.json"),
        (["bench", "speed", "TINY", "--contexts", "a"], "contexts: 'a' is not a list of whole numbers"),
        (["bench", "speed", "TINY", "--contexts", "5"], "contexts: 5 tokens are too few to measure; give 16 or more"),
        (["plan", "TINY", "--context", "256"], "256 tokens are too few: a plan is calibrated on documents of 256"),
        (["plan", "TINY", "--quality", "300"], "quality: 300 tokens are too few"),
        (["plan", "TINY", "--seed", "-1"], "seed"),
        (["plan", "TINY", "--seed", str(2**64)], "seed"),
        (["plan", "TINY", "--device", "gpu 0"], "device: 'gpu 0' is no device; name one as in cpu, cuda"),
        (["plan", "TINY", "--bugdet", "0.3"], "Possible options: --budget"),
        (["plan", "smolm2"], "smolm2: unknown model; did you mean smollm2?"),
        (["plan", "Gemma3"], "did you mean gemma3-270m?"),
        (["plan", "a\x1b]0;b\nc"], r"a\x1b]0;b\nc: unknown model"),
        (["plan", "a/b c"], "a/b c: unknown model"),
        (["generate", "TINY", "--plan", "file", "--prompt", "x"], "file: not a plan: it is not JSON"),
        (["generate", "TINY", "--plan", ".", "--prompt", "x"], "cannot read plan .: Is a directory"),
        (["generate", "TINY", "--prefix", ".", "--prompt", "x"], "cannot read .: it is a folder"),
        (["analyze", "TINY", "--device", "cpu", "--max-memory", "cpu=1GB"], "device: give one of"),
        (["analyze", "--rerun", ".", "--out", "new"], ".: not a census folder: it has no census.json"),
        (["compare", "file", "b"], "file: no such folder; a census is a folder that headsink analyze has written"),
        (["bench", "speed", "TINY", "--plan", "nosuch.json"], "cannot read plan nosuch.json: No such file"),
        (["bench", "speed", "TINY", "--contexts", "3000"], "exceed the model's maximum of 2048; give 16 to 2015"),
        (["bench", "quality", "TINY", "--tasks", "chess"], "tasks: 'chess' is unknown; one of humaneval"),
        (["bench", "domains", "TINY", "--domains", "code"], "domains: code is only one; give two or more"),
        (["bench", "all", "--models", "smolm2", "--out", "new"], "did you mean smollm2?"),
        (["bench", "results", "nosuch"], "nosuch: no such folder"),
        (["bench", "sped"], "Did you mean 'speed'? See headsink --help"),
        (["analyse"], "No such command 'analyse'. Did you mean 'analyze'? See headsink --help"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tiny_folder, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "PLAN").write_text("{}")
    status, out, err = run(*(str(tiny_folder) if word == "TINY" else word for word in words))
    assert (status, out) == (2, "")
    assert reason in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("headsink: ")
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "PLAN"}


REFUSED_AT_ONCE = (
    "plan --budget 3",
    "plan --max-kl 0",
    "plan --context 256",
    "plan --quality 300",
    "plan --policy best",
    "plan --domains poems",
    "plan --dtype int3",
    "plan --device gpu-0",
    "plan --out .",
    "plan smolm2",
    "plan nosuch.gguf",
    "plan --frontier new --budgets 2",
    "analyze --lengths 1",
    "analyze --maps 3",
    "analyze --domains poems",
    "analyze --tau 2",
    "analyze --prompts nosuch",
    "analyze --tensor-parallel",
    "analyze --rerun nosuch",
    "compare nosuch other",
    "ablate --heads 3",
    "ablate --heads 3.2 --pattern wide",
    "ablate --heads 3.2 --null none",
    "ablate --heads 3.2 --context 300",
    "ablate --census nosuch",
    "read --plan nosuch.json",
    "generate --prompt x --plan nosuch.json",
    "generate --prompt x --prefix nosuch",
    "generate --file nosuch",
    "serve smollm2 --plan nosuch.json",
    "doctor --dtype int3",
    "bench speed --contexts 5",
    "bench memory --batches 0",
    "bench quality --tasks chess",
    "bench quality --budgets 2",
    "bench domains --texts 5",
    "bench all --out new --domains poems,code",
    "bench rerun nosuch row",
    "bench results nosuch",
)


def test_help_and_bad_arguments_do_not_wait_for_torch(tmp_path):
    code = (
        "import sys\nimport headsink.cli.main\n"
        f"for line in ['--help', 'plan --help', 'bench --help', 'models', *{REFUSED_AT_ONCE!r}]:\n"
        "    sys.argv = ['headsink', *line.split()]\n"
        "    try:\n        headsink.cli.main.main()\n"
        "    except SystemExit as stop:\n        sys.stderr.write(f'{stop.code or 0}: {line}\\n')\n"
        "heavy = {'torch', 'transformers', 'numba', 'pyarrow', 'altair', 'numpy'} & sys.modules.keys()\n"
        "sys.stderr.write(f'heavy: {sorted(heavy)}\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("0: ")] == [
        "0: --help",
        "0: plan --help",
        "0: bench --help",
        "0: models",
    ]
    assert [line for line in lines if line.startswith("2: ")] == [f"2: {line}" for line in REFUSED_AT_ONCE]
    assert len([line for line in lines if line.startswith("headsink: ")]) == len(REFUSED_AT_ONCE)
    assert lines[-1] == "heavy: []"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_package_has_its_public_names_before_and_after_a_module_of_the_name_is_imported():
    code = (
        "import headsink, importlib\n"
        "assert set(headsink.__all__) <= set(dir(headsink))\n"
        "from headsink import *\n"
        "assert all(getattr(headsink, name) is globals()[name] for name in headsink.__all__)\n"
        "assert not hasattr(headsink, 'nosuch')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    stub = Path(headsink.__file__).with_name("__init__.pyi").read_text()
    assert sorted(headsink.__all__) == sorted(ast.literal_eval(stub.partition("__all__ = ")[2]))


def test_a_warning_is_one_line_without_its_place_in_the_code():
    code = (
        "import typer, warnings; from headsink.utils.terminal import run; app = typer.Typer()\n"
        "@app.command()\n"
        "def warn(): warnings.warn('too long'); warnings.warn('old', FutureWarning)\n"
        "run(app)"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=True)
    first, *others = done.stderr.splitlines()
    assert first == "headsink: too long"
    assert others[0].endswith("FutureWarning: old")


def test_the_terminal_says_that_it_compiles_while_the_step_is_compared(monkeypatch):
    shown = []

    @contextmanager
    def status(message):
        shown.append(message)
        yield
        shown.clear()

    monkeypatch.setattr(loading.err, "status", status)
    monkeypatch.setattr("headsink.decoding.step.refusal", lambda *_: "no" if shown else pytest.fail("nothing said"))
    loading.compile_step(None, None, "int8")
    loading.compile_step(None, None)  # nothing to compile: `refusal` is not asked


def test_help_is_wrapped_by_the_terminal_alone(run, monkeypatch):
    for words in (["serve"], ["bench", "serving"], ["plan"]):
        monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
        text = run(*words, "--help")[1].partition("─ Arguments")[0]
        lines = [line.strip() for line in text.splitlines()]
        # a line ends only where its next word does not fit, or with its paragraph
        broken = [a for a, b in pairwise(lines) if a and b and len(f"{a} {b.split()[0]}") <= 78]
        assert len(lines) > 8
        assert broken == []


def test_the_command_that_installs_a_model_is_not_cut(run, monkeypatch):
    monkeypatch.setattr(builtin.BuiltIn, "paths", lambda self: None)
    monkeypatch.setattr("headsink.utils.terminal.out.width", 60)
    text = run("models")[1]
    for model in builtin.BUILT_IN.values():
        assert f"To install {model.name}: {model.install}\n" in text
    assert "…" not in text


def test_version_and_completion(run, monkeypatch):
    assert run("--version") == (0, f"headsink {version('headsink')}\n", "")
    status, out, _ = run("--help")
    assert status == 0
    assert "--install-completion" in out  # and --show-completion
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setenv("_HEADSINK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "headsink an")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run()[1].split() == ["analyze"]
    monkeypatch.setenv("COMP_WORDS", "headsink plan nosuch --max")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert run()[1].split() == ["--max-kl"]


def test_the_case_of_a_built_in_name_does_not_matter():
    for name in ("SmolLM2", "smolLM2-135M-Instruct", "SMOLLM2 135m instruct"):
        assert check_name(name) == "smollm2"
    if builtin.BUILT_IN["gemma3-270m"].paths():
        assert check_name("Gemma 3 270M") == check_name("gemma3-270M") == "gemma3-270m"
    assert check_name("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_folder_without_a_tokenizer_is_refused(run, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*token*"))
    reason = "no tokenizer in this folder; save it there: tokenizer.save_pretrained(FOLDER)"
    assert reason in run("generate", tmp_path / "model", "--prompt", "x")[2]
    with pytest.raises(HeadsinkError, match=re.escape(reason)):
        headsink.load(tmp_path / "model")


class _Hub(BaseHTTPRequestHandler):
    """A hub without models."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        """Do not log, because standard error is tested."""


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_a_download_is_announced_before_the_hub_is_contacted(there):
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    if there:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    address = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    command = [sys.executable, "-m", "headsink", "generate", "nobody/nothing", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | address, check=False)
    first, *between, last = done.stderr.splitlines()
    assert done.returncode == 2
    assert first == "looking for nobody/nothing on the Hugging Face hub ..."
    if there:
        server.shutdown()
        assert between == []
        assert last.startswith("headsink: nobody/nothing: no such model on the Hugging Face hub, and no such folder")
    else:
        assert between[0].startswith("the hub cannot be reached (")
        assert last.startswith("headsink: nobody/nothing: cannot be loaded: it is not on this machine, and the Hugging")


def test_default_contexts_of_bench_fit_the_model(run, tiny_folder, tmp_path):
    assert contexts_for(8192, 33) == [512, 2000, 7500]
    assert contexts_for(2032, 33) == [512]
    shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"max_position_embeddings": 60}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    words = ("bench", "speed", tmp_path / "model", "--device", "cpu", "--tokens", "4", "--rounds", "1", "--json")
    status, out, err = run(*words)
    assert status == 0, err
    assert {row["context"] for row in json.loads(out)["results"]} == {56}


def test_doctor_reports_the_tested_transformers(run, monkeypatch):
    assert f"(tested: {versions.OLDEST} to {versions.NEWEST})" in run("doctor", "--device", "cpu")[1]
    assert doctor.transformers_warning() is None
    monkeypatch.setattr(doctor, "NEWEST", "5.9")
    monkeypatch.setattr(doctor, "OLDEST", "5.4")
    status, out, err = run("doctor", "--device", "cpu", "--json")
    warning = f"transformers {version('transformers')} is not tested: headsink is tested with 5.4 to 5.9; run: "
    assert status == 0
    assert err == warning + 'pip install "transformers>=5.4,<5.10"\n'
    assert json.loads(out)["transformers"]["warning"] == err.strip()


def test_the_estimate_leaves_the_first_pass_out(monkeypatch):
    """The first pass of a process is slow."""
    model, passes = headsink.load("smollm2", device="cpu")[0], iter([9.0, 0.1, 0.2, 0.4])
    monkeypatch.setattr(timing, "_seconds", lambda model, tokens: next(passes))
    assert timing.seconds_per_token(model) == pytest.approx(0.4 / 128)


@pytest.mark.slow
def test_the_expected_time_is_printed_at_the_start(run, tiny_folder, tmp_path):
    words = (
        "analyze",
        tiny_folder,
        "--out",
        tmp_path / "a",
        "--lengths",
        "32",
        "--domains",
        "maths",
        "--device",
        "cpu",
    )
    assert run(*words)[2].splitlines()[0] == "census: less than a minute"
    words = ("plan", tiny_folder, "--out", tmp_path / "p.json", "--context", "450", "--quality", "none")
    assert run(*words, "--budget", "0.5", "--device", "cpu")[2].splitlines()[0] == "plan: less than a minute"
    assert [timing.format_duration(s) for s in (59, 61, 200, 9000)] == [
        "less than a minute",
        "about 1 minute",
        "about 3 minutes",
        "about 2.5 hours",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["models", "--help", "plan --help"])
def test_an_unwritable_output_gives_no_traceback(words):
    command = [sys.executable, "-m", "headsink", *words.split()]
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (closed.returncode, closed.stderr) == (1, "")
    none = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert (none.returncode, none.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "headsink: cannot write standard output: the disk is full\n"


def test_a_plan_for_another_model_is_refused(run, tiny_folder, smollm2, tmp_path):
    path = Plan.full(smollm2[0]).save(tmp_path / "plan.json")
    status, _, err = run("generate", tiny_folder, "--prompt", "x", "--plan", path)
    assert status == 2
    assert "the plan is for another model: layers is 3 here and 30 in the plan" in err


# no partial files


def test_a_full_disk_leaves_nothing(tmp_path):
    """Simulate a full disk by a limit on the size of files: the system call fails in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(HeadsinkError, match="cannot write"):
            files.write_text(tmp_path / "plan.json", "x" * 1000)
        with (
            pytest.raises(HeadsinkError, match="cannot write"),
            files.new_folder(tmp_path / "census", "census.json") as part,
        ):
            (part / "a").write_text("x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def fill_and_stop(folder):
    with files.new_folder(folder, "m") as part:
        (part / "m").write_text('{"is": "new"}')
        raise KeyboardInterrupt


def test_an_old_folder_stays_until_the_new_one_is_complete(tmp_path):
    with files.new_folder(tmp_path / "census", "m") as part:
        (part / "m").write_text('{"is": "old"}')
    with pytest.raises(KeyboardInterrupt):
        fill_and_stop(tmp_path / "census")
    assert json.loads((tmp_path / "census" / "m").read_text())["is"] == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_census_command_resumes(tiny_folder, tmp_path, how, run):
    words = [
        "analyze",
        tiny_folder,
        "--lengths",
        "1024",
        "--texts-per-domain",
        "8",
        "--domains",
        "maths",
        "--device",
        "cpu",
    ]
    # A shell that starts tests in the background makes them and their children ignore ctrl-C.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from headsink.cli.main import main; main()"
    words += ["--out", tmp_path / "census", "--json"]
    command = [sys.executable, "-c", code, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / ".census.partial"
    while len(list(kept.glob("*.safetensors"))) < 2:  # wait for some finished texts; the run ends if there are none
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert "Traceback" not in err
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how
        assert "start it again to go on" in err
    done = list(kept.glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == [".census.partial"]
    status, out, err = run(*words)
    assert status == 0, err
    assert f"continuing: {len(done)} of 8 texts are done" in err
    assert json.loads(out)["folder"] == str(tmp_path / "census")
    assert [path.name for path in tmp_path.iterdir()] == ["census"]
