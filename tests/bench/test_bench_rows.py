"""Rows of `headsink bench all`, their comparison with a rerun, and the page made from them."""

import copy
import json
import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest

from headsink import HeadsinkError
from headsink.bench.suite import joined, pictures, records
from headsink.bench.suite import page as results
from headsink.bench.suite.records import Row
from headsink.utils.statistics import spread

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "all"
MACHINE = {"cores": 2, "threads": 2, "cpu": "a CPU (x86_64)", "memory_bytes": 2**34}
VERSIONS = {"headsink": "0.1.0", "torch": "2.13.0"}
FULL = {"way": "full", "score": 0.5, "score_interval": [0.4, 0.6], "kept": 1.0}
PLAN = {
    "way": "0.25",
    "kept": 0.251,
    "score": 0.423,
    "score_interval": [0.33, 0.52],
    "change": -0.077,
    "change_interval": [-0.12, -0.03],
    "p": 0.011,
    "same_output": 0.37,
    "same_tokens": 0.717,
    "same_tokens_interval": [0.65, 0.78],
    "kl": 0.1234,
    "kl_interval": [0.09, 0.15],
}


def record(name, found, **more):
    command = f"headsink bench all --out DIR --only {name}"
    on = {"versions": VERSIONS, "machine": MACHINE, "date": "2026-11-26", "seconds": 61.0}
    return {
        "row": name,
        "command": command,
        **on,
        "settings": {"contexts": [512], "batches": [1]},
        "found": found,
        **more,
    }


def timed(way, decode, prefill, kv):
    base = {"context": 512, "batch": 1, "way": way, "kept": 1.0, "kv_bytes": kv, "kv_ratio": kv and kv / 10**7}
    ratios = {
        "decode_ratio": spread([0.04 / one for one in decode]),
        "prefill_ratio": spread([0.5 / one for one in prefill]),
    }
    return base | {"decode_s": spread(decode), "prefill_s": spread(prefill)} | ratios


@pytest.fixture
def done():
    """A row of each kind, and one that could not be measured. The plan is slower than transformers at prefill."""
    quality = {"task": "gsm8k", "metric": "right", "higher_is_better": True, "context": 2000, "items": 50, "seed": 0}
    quality |= {
        "prompt_tokens": {"median": 1800, "min": 1500, "max": 1999},
        "ways": [dict(FULL), dict(PLAN)],
        "records": [[1, 0]],
    }
    ways = [
        timed("transformers", [0.04, 0.041], [0.5, 0.51], 10**7),
        timed("headsink, 0.25", [0.01, 0.012], [0.625, 0.62], 3 * 10**6),
    ]
    missing = {"peer": "vLLM", "missing": "not installed", "install": "make it"}
    speed = {"dtype": "bfloat16", "peers": [missing], "results": ways}
    sizes = [
        {
            "context": 512,
            "batch": 1,
            "way": way,
            "kv_bytes": kv,
            "kv_ratio": kv / 10**7,
            "peak_bytes": spread([peak]),
            "peak_ratio": spread([peak / 8e8]),
        }
        for way, kv, peak in (("transformers", 10**7, 8e8), ("headsink, 0.25", 3 * 10**6, 8.4e8))
    ]
    memory = {"dtype": "bfloat16", "peers": [missing], "results": sizes}
    found = {"quality/smollm2/gsm8k": quality, "speed/smollm2/512x1": speed, "memory/smollm2/512x1": memory}
    absent = record("quality/smollm2/squad", {}, missing="pip install it")
    del absent["found"], absent["seconds"]
    return {name: record(name, one) for name, one in found.items()} | {"quality/smollm2/squad": absent}


@pytest.fixture
def folder(done, tmp_path):
    for row in done.values():
        records.save(tmp_path / "all", row)
    return tmp_path / "all"


def test_rows_are_files_that_are_read_back(done, folder):
    assert records.read_rows(folder) == done
    path = records.file_of(folder, "speed/smollm2/512x1")
    assert path == folder / "rows" / "speed" / "smollm2" / "512x1.json"
    for text in ("{", "[]", '{"row": "a", "settings": {}, "command": ""}'):
        path.write_text(text)
        with pytest.raises(HeadsinkError, match=r"512x1\.json: not a row"):
            records.read_rows(folder)


def test_a_row_is_measured_once_for_its_settings(tmp_path):
    row = Row("a/b", {"items": (1, 2)}, lambda checkpoint: {"command": "x", "figure": 3}, 60, " --items 1,2")
    assert records.state(row, {}) == "to do"
    made = records.measure(row, tmp_path / "partial")
    assert made["found"] == {"figure": 3}
    assert made["command"] == "headsink bench all --out DIR --only a/b --items 1,2"
    assert re.fullmatch(r"[0-9a-f]{12}\+?", made["commit"])  # of the sources that the tests run
    assert made["limits"].keys() == {"read_bytes_per_s", "float32_flops", "bfloat16_flops"}
    assert 1e7 < min(made["limits"].values()) < 1e15
    records.save(tmp_path, made)
    assert records.state(row, records.read_rows(tmp_path)) == "measured"
    other = Row("a/b", {"items": (1, 3)}, row.measure, 60)
    assert records.state(other, records.read_rows(tmp_path)) == "measured with other settings"


def test_failed_measurements_are_recorded_with_the_reason(tmp_path):
    def measure(checkpoint):
        raise HeadsinkError("tasks: /a/b/data.json is not here: pip install it and/or look at owner/name")

    made = records.measure(Row("a/b", {}, measure, 60), tmp_path / "partial")
    assert made["missing"] == "tasks: data.json is not here: pip install it and/or look at owner/name"
    records.save(tmp_path, made)
    assert records.state(Row("a/b", {}, measure, 60), records.read_rows(tmp_path)) == "missing"


def verdicts(before, now):
    return {one.figure: one.verdict for one in records.compare(before, now)}


def test_an_equal_rerun_has_no_differences(done):
    for row in done.values():
        found = verdicts(row, copy.deepcopy(row))
        assert found
        assert set(found.values()) == {"the same"}


def test_a_rerun_finds_changed_figures(done):
    before = done["quality/smollm2/gsm8k"]
    now = copy.deepcopy(before)
    plan = now["found"]["ways"][1]
    plan |= {"score": 0.45, "kl": 0.2, "same_output": 0.3, "p": 0.5}
    now["found"]["records"] = []
    found = verdicts(before, now)
    assert found["ways[0.25].score"] == "within"
    assert found["ways[0.25].kl"] == "outside"
    assert found["ways[0.25].same_output"] == "changed"
    assert found["ways[0.25].change"] == found["ways[full].score"] == found["items"] == "the same"
    assert not [name for name in found if name.endswith(".p") or "records" in name]
    del plan["kept"]
    assert verdicts(before, now)["ways[0.25].kept"] == "changed"
    now["machine"] = MACHINE | {"cpu": "another"}
    found = verdicts(before, now)
    assert found["ways[0.25].same_output"] == "not compared"  # rounding differs there
    assert found["ways[0.25].kl"] == "outside"


@pytest.mark.parametrize(
    ("decode", "verdict"), [([0.0109, 0.0111], "overlaps"), ([0.0131, 0.0135], "overlaps"), ([0.016, 0.017], "outside")]
)
def test_times_overlap_within_a_tenth_on_one_machine(done, decode, verdict):
    before = done["speed/smollm2/512x1"]
    now = copy.deepcopy(before)
    now["found"]["results"][1]["decode_s"] = spread(decode)
    assert verdicts(before, now)["results[headsink, 0.25].decode_s"] == verdict
    now["machine"] = MACHINE | {"cores": 4}
    assert verdicts(before, now)["results[headsink, 0.25].decode_s"] == "not compared"
    del now["found"]["results"][0]
    assert verdicts(before, now)["results[transformers]"] == "not compared"


@pytest.mark.slow
def test_the_page_has_every_figure_and_names_its_row(done, folder, tmp_path):
    text = results.write(folder, tmp_path / "docs" / "results.md").read_text()
    for figure in (
        *("0.500 [0.400, 0.600]", "0.423<br>-0.077 [-0.120, -0.030]<br>25.1%", "50<br>1,800 (1,500–1,999)"),
        *("0.1234 [0.0900, 0.1500]<br>71.7% [65.0%, 78.0%]<br>37.0%", "11.0 (10.0–12.0)", "0.62 (0.62–0.62)"),
        *(
            "0.300 | 3.0",
            "1.050 | 840 (840–840)",
            "a CPU (x86_64), 2 cores, 2 threads, 16 GiB; headsink 0.1.0, torch 2.13.0",
        ),
    ):
        assert figure in text
    for name in done:
        assert f"| [{name}](../all/rows/{name}.json) |  | 2026-11-26 |" in text
    assert "`headsink bench all --out DIR --only ROW OPTIONS` measures a row" in text
    assert f"{results.SERVING}" not in text
    lines = text.splitlines()
    for line, after in pairwise(lines):
        if line.startswith("| ") and "| ---" not in (line[:5], after[:5]):  # neither heads nor the rule below them
            assert "/rows/" in line
    for picture in re.findall(r"\]\((pictures/[^)]*)\)", text):
        assert (tmp_path / "docs" / picture).stat().st_size > 1000


@pytest.fixture
def suite_row():
    """A task of a suite, on which the plan is worse without reconstruction."""
    worse = {"way": "0.25", "score": 0.5, "change": -0.375, "change_interval": [-0.75, -0.125], "p": 0.02}
    same = {"way": "0.25, reconstruction", "score": 0.875, "change": 0.0, "change_interval": [0.0, 0.0], "p": 1.0}
    ways = [{"way": "full", "score": 0.875, "score_interval": [0.6, 1.0], "kept": 1.0}]
    ways += [one | {"score_interval": [0.1, 1.0], "kept": 0.2512} for one in (worse, same)]
    task = {"suite": "ruler", "task": "vt", "length": 2000, "items": 8, "metric": "score", "higher_is_better": True}
    sizes = {"median": 1900, "min": 1880, "max": 1904}
    return record("suite/smollm2/ruler/vt", task | {"document_tokens": sizes, "ways": ways, "records": []})


@pytest.mark.slow
def test_suites_have_a_table_and_count_among_the_tasks(done, folder, suite_row, tmp_path):
    records.save(folder, suite_row)
    text = results.write(folder, tmp_path / "results.md").read_text()
    row, quality = (f"all/rows/{name}.json" for name in ("suite/smollm2/ruler/vt", "quality/smollm2/gsm8k"))
    assert "| suite and task | full cache | 25.0% | 25.0%, reconstruction | prompts, tokens |" in text
    plan, reconstructed = "0.500<br>-0.375 [-0.750, -0.125]<br>25.1%", "0.875<br>+0.000 [+0.000, +0.000]<br>25.1%"
    assert f"| [ruler/vt]({row}) | 0.875 [0.600, 1.000] | {plan} | {reconstructed} | 8<br>1,900 |" in text
    assert "| **25.0%** | 2 of 2 | 0.123 (0.123–0.123) |" in text  # a suite has no KL
    assert text.index(f"[vt]({row}) | 0.875 | 25.0%: 0.500") < text.index(f"[gsm8k]({quality}) | 0.500 | 25.0%: 0.423")


@pytest.mark.slow
def test_the_page_begins_with_a_line_for_each_plan(done, folder, tmp_path):
    squad = copy.deepcopy(done["quality/smollm2/gsm8k"])
    squad["found"]["ways"][1] |= {"change_interval": [-0.12, 0.01], "kl": 0.5, "same_tokens": 0.25}
    records.save(folder, squad | {"row": "quality/smollm2/squad"})
    hopeless = copy.deepcopy(squad)
    hopeless["found"]["ways"][0] |= {"score": 0.0}
    hopeless["found"]["ways"][1] |= {"kl": 0.2, "same_tokens": 0.5}
    records.save(folder, hopeless | {"row": "quality/smollm2/qasper"})
    longer = copy.deepcopy(done["speed/smollm2/512x1"])
    for one in longer["found"]["results"]:
        one["context"] = 2000
    longer["found"]["results"].append(timed("llama.cpp", [0.2, 0.3], [0.9, 0.9], None) | {"context": 2000})
    records.save(folder, longer | {"row": "speed/smollm2/2000x1"})
    plan = {
        "budget": 0.25,
        "kept": 0.249,
        "verified": {"kl_text": 0.01, "kl_answers": 0.02},
        "patterns": {"4+9k+32": 70, "full": 10} | {f"4+{n}k+32": 1 for n in range(20, 30)},
    }
    records.save(folder, record("plan/smollm2", {"plans": [plan]}))
    text = results.write(folder, tmp_path / "results.md").read_text()
    part = text[text.index("## In short") : text.index("## What a plan costs")]
    plan_row, timed_row = "[smollm2](all/rows/plan/smollm2.json)", "[2,000](all/rows/speed/smollm2/2000x1.json)"
    assert (
        f"| {plan_row} | **25.0%** | 1 of 2 | 0.200 (0.123–0.500) | 50% (25%–72%) | {timed_row} | 11.0 | 0.62 | 3.0 |"
        in part
    )
    assert f"| smollm2 | transformers |  |  |  | {timed_row} | 40.5 | 0.51 | 10.0 |" in part
    assert f"| smollm2 | llama.cpp |  |  |  | {timed_row} | 250.0 | 0.90 | not reported |" in part
    ones = ", ".join(f"1x 4+{n}k+32" for n in range(20, 26))
    assert f"| {plan_row} | 25.0% | 24.9% | 0.0100 | 0.0200 | 70x 4+9k+32, 10x full, {ones}, 4 others |" in part
    squad["found"]["ways"][1] |= {"way": "0.5"}  # which was not timed
    records.save(folder, squad | {"row": "quality/smollm2/squad"})
    text = results.write(folder, tmp_path / "results.md").read_text()
    assert f"| {plan_row} | **50.0%** | 0 of 1 | 0.500 (0.500–0.500) | 25% (25%–25%) | not measured |" in text


def test_slower_and_worse_results_are_listed_by_rule(done, folder, tmp_path):
    text = results.write(folder, tmp_path / "results.md").read_text()
    part = text[text.index("## Where it is slower or worse") : text.index("## What was not measured")]
    slow, more, scores = (re.findall(r"^\| (?!-)(.*) \|$", one, re.MULTILINE)[1:] for one in part.split("**")[2:8:2])
    case = "[smollm2, 512 x 1](all/rows/{}/smollm2/512x1.json) | transformers | 0.25: {}"
    assert slow == ["TTFT | " + case.format("speed", "0.811 (0.800–0.823)")]
    assert more == ["peak memory | " + case.format("memory", "0.952 (0.952–0.952)")]
    assert scores == ["smollm2 | [gsm8k](all/rows/quality/smollm2/gsm8k.json) | 0.500 | 25.0%: 0.423"]
    assert "KL(full || plan) is above 0 with its whole interval in 1 of 1 pairs" in part
    rest = text[text.index("## What was not measured") :]
    assert "squad.json): pip install it" in rest
    assert "vLLM: not installed (make it), in [memory/smollm2/512x1]" in rest


def test_a_planted_slow_row_comes_first_and_a_good_one_not_at_all(done, folder, tmp_path):
    row = done["speed/smollm2/512x1"]
    row["found"]["results"].append(timed("headsink, 0.5", [0.4, 0.4], [0.1, 0.1], 5 * 10**6))
    row["found"]["results"].append(timed("llama.cpp", [0.2, 0.2], [0.9, 0.9], 10**7))
    records.save(folder, row)
    quality = done["quality/smollm2/gsm8k"]
    quality["found"]["ways"][1] |= {"change_interval": [-0.12, 0.01], "kl": None, "kl_interval": None}
    records.save(folder, quality)
    part = results.write(folder, tmp_path / "results.md").read_text().split("## Where it is slower or worse")[1]
    slow = [line for line in part.splitlines() if "[smollm2, 512 x 1](all/rows/speed/" in line]
    assert slow[0].startswith("| TPOT |")
    assert "| transformers | 0.5: 0.101 (" in slow[0]
    assert "| llama.cpp | 0.5: 0.500 (" in slow[1]
    part = part.split("## What was not")[0]
    assert part.count("None in these rows.") == 1
    assert "in 0 of 0 pairs" in part


def test_domains_are_shown_with_the_chance_level(done, folder, tmp_path):
    sure = {"kl": 0.0123, "interval": [0.01, 0.015]}
    names = ("default", "prose", "code")
    cells = [
        {"calibrated_on": a, "tested_on": b, **sure, "right": 5, "right_full": 6}
        for a in names
        for b in ("prose", "code")
    ]
    pairs = [
        {"families": both, "scores": {"far": {"beyond_chance": share}}, "other_role": share / 2}
        for both, share in ((["prose", "prose"], 0.02), (["prose", "code"], 0.3))
    ]
    agreement = [
        {"plans": both, "moved": moved} for both, moved in ((["prose", "prose"], 0.1), (["prose", "code"], 0.4))
    ]
    found = {"families": ["prose", "code"], "context": 2000, "budget": 0.25, "cells": cells, "own": sure}
    found |= {"noise": [{"tested_on": "prose", **sure}], "census": {"pairs": pairs}, "agreement": agreement}
    records.save(folder, record("families/smollm2", found))
    text = results.write(folder, tmp_path / "results.md").read_text()
    part = text[text.index("## Are specialised prompts different?") : text.index("## Where it is")]
    for figure in (
        *("| calibrated on | on prose | on code |", "| 0.0123 [0.0100, 0.0150]<br>5/6 |"),
        *("costs +0.0123 [+0.0100, +0.0150] more", "differ by: prose +0.0123 [+0.0100, +0.0150]"),
        "Texts of one domain: 2.0% of the heads differ in far attention, 1.0% in role; plans give 10.0% of the keys",
        "Texts of two domains: 30.0% of the heads differ in far attention, 15.0% in role; plans give 40.0% of the keys",
        "[default](all/rows/families/smollm2.json)",
    ):
        assert figure in part


def test_serving_is_shown_as_it_was_measured(done, folder, tmp_path):
    times = {"ttft_ms": {"p50": 1500, "p90": 2500}, "tpot_ms": {"p50": 40, "p90": 50}}
    rows = [
        {
            "round": n,
            "way": way,
            "clients": clients,
            "requests": 2 * clients,
            "tokens_per_s": speed * clients + n,
            **times,
        }
        | {"most_running": clients, "preemptions": 3, "right": clients}
        for n in (0, 1)
        for clients in (1, 16)
        for way, speed in (("stock", 100), ("dense", 150))
    ]
    ratios = [
        {"way": "dense", "clients": 1, "tokens_per_s": spread([0.5, 0.5])},
        {"way": "dense", "clients": 16, "tokens_per_s": spread([1.5, 1.495])},
    ]
    found = {"command": "headsink bench serving smollm2", "rows": rows, "ratios": ratios}
    (folder.parent / results.SERVING).write_text(json.dumps(found))
    text = results.write(folder, tmp_path / "results.md").read_text()
    part = text[text.index("## Serving") :]
    for figure in (
        "| clients | server | tokens/s | TTFT p50 / p90, s | TPOT p50 / p90, ms | running | preempted | answers right |",
        "| 1 | stock vLLM | 100 | 1.50 / 2.50 | 40 / 50 | 1 | 3 | 1 of 2 |",
        "| 16 | plan | 2,400 | 1.50 / 2.50 | 40 / 50 | 16 | 3 | 16 of 32 |",
        "Plan, 16 at once: 1.50x the throughput of stock vLLM.",
    ):
        assert figure in part
    link = f"[{results.SERVING}]({results.SERVING})"
    assert f"| serving: throughput | {link}, 1 clients | vLLM | plan: 0.500 (0.500–0.500) |" in part
    assert f"{link}, 16 clients" not in part


@pytest.mark.skipif(not (COMMITTED / "rows").is_dir(), reason="no rows are committed")
def test_the_committed_page_matches_the_committed_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    done, page = records.read_rows(COMMITTED), Path("docs/results.md")
    drawn = list(pictures.drawn(done))
    assert results.page(COMMITTED.relative_to(ROOT), done, page, drawn) == page.read_text(encoding="utf-8")
    assert all(Path(f"docs/pictures/results-{name}.png").is_file() for name in drawn)


def test_a_folder_without_rows_makes_no_page(tmp_path):
    with pytest.raises(HeadsinkError, match=r"no row in it was measured; headsink bench all --out"):
        results.write(tmp_path, tmp_path / "results.md")


def test_the_leaderboard_tells_older_records_from_those_of_today():
    """In records without a schema "headsink" is online eviction, which `benchmarks/plans.py` has no more."""
    leaderboard, plans = (runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py")) for name in ("leaderboard", "plans"))
    record = {"budget": 0.5, "context": 9, "case": "a", "kv_bytes": 1, "kv_bytes_full": 2, "nll": 1.0, "right": True}
    both = [{"form": form} | record for form in ("text", "one")]
    old = {"records": [{"method": method} | one for method in ("full", "headsink") for one in both]}
    new = {"schema": plans["SCHEMA"]} | old
    names = [leaderboard["leaderboard"]([run])[0]["method"] for run in (old, new)]
    assert names == ["headsink, online eviction", "headsink"]
    assert leaderboard["NAMES"]["headsink"] not in plans["METHODS"]
    assert leaderboard["NAMES"]["headsink, retold"] in plans["METHODS"]


# several machines


def test_machines_are_joined_and_the_range_is_shown_where_they_disagree(done, folder, suite_row, tmp_path):
    other = tmp_path / "other"
    records.save(folder, suite_row)
    records.save(other, suite_row)
    for name in ("quality/smollm2/gsm8k", "speed/smollm2/512x1"):
        row = copy.deepcopy(done[name]) | {"machine": MACHINE | {"threads": 1}, "commit": "0123456789ab"}
        row["limits"] = {"read_bytes_per_s": 8e10, "float32_flops": 1e11, "bfloat16_flops": 3e11}
        if "results" in row["found"]:
            row["found"]["baseline_kernels"] = {"attention": "sdpa", "prefill": ["aten._a"], "decode": ["aten._b"]}
            row["found"]["results"][1] = timed("headsink, 0.25", [0.02, 0.021], [0.63, 0.62], 3 * 10**6)
        records.save(other, row)
    text = joined.write([folder, other], tmp_path / "joined.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    by_name = {(line[0], line[2]): line for line in lines if line[1] == "smollm2"}
    assert by_name["TPOT ratio", "512 x 1"][-1] == "**1.952–3.667**"
    assert by_name["TTFT ratio", "512 x 1"][-1] == "0.802"
    assert by_name["score change", "gsm8k, 50 prompts"][-1] == "-0.077"
    assert by_name["score change", "vt, 8 prompts"][-2:] == ["0.000 (0.000–0.000)", "0.000"]
    assert ("peak memory ratio", "512 x 1") not in by_name  # only one of them has it
    assert [line[2] for line in lines if line[0] == "all"] == ["a CPU (x86_64), 2 cores, 2 threads"]
    assert next(line for line in lines if line[0] == "other")[2:] == [
        *("a CPU (x86_64), 2 cores, 1 thread", "0123456789ab", "headsink 0.1.0, torch 2.13.0"),
        *("80", "100, 300", "aten._a / aten._b"),
    ]
    records.save(folder, records.read_rows(other)["speed/smollm2/512x1"])  # one row with other threads
    text = joined.write([folder, other], tmp_path / "joined.md").read_text()  # replaces its own page
    machines = re.findall(r"^\| all \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
    assert machines == [
        ("memory, quality, suite", "a CPU (x86_64), 2 cores, 2 threads"),
        ("speed", "a CPU (x86_64), 2 cores, 1 thread"),
    ]
    with pytest.raises(HeadsinkError, match=r"^folders: two are called all; columns go by it, so rename one$"):
        joined.write([folder, folder], tmp_path / "joined.md")
    records.file_of(other, "speed/smollm2/512x1").unlink()
    records.file_of(other, "quality/smollm2/gsm8k").unlink()
    records.file_of(other, suite_row["row"]).unlink()
    with pytest.raises(HeadsinkError, match=r"other: no row in it was measured"):
        joined.write([folder, other], tmp_path / "joined.md")
    records.save(other, done["memory/smollm2/512x1"])
    records.file_of(folder, "memory/smollm2/512x1").unlink()
    with pytest.raises(HeadsinkError, match=r"^folders: no row is in two of all, other; measure the same rows"):
        joined.write([folder, other], tmp_path / "joined.md")


def test_the_baselines_operators_are_named(tiny_folder):
    import headsink
    from headsink.bench.comparison import attention_kernels

    found = attention_kernels(headsink.load(str(tiny_folder), device="cpu")[0])
    assert found["attention"] == "sdpa"
    for key in ("prefill", "decode"):
        assert found[key]
        assert all(name.startswith("aten._scaled_dot_product") for name in found[key])
