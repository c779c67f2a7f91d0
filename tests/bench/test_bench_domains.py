"""`headsink bench domains` on a tiny model."""

import json

import pytest
import torch
from families import CONFIGS
from small_tokenizer import Small
from transformers import AutoModelForCausalLM

from headsink import HeadsinkError, Plan
from headsink.bench.domain_plans import DEFAULT, SEED_DISTANCE
from headsink.bench.domains import clear, run
from headsink.calibration.calibrate import _documents
from headsink.cli.bench.domains import table
from headsink.data.documents import document
from headsink.evaluation.quality import score

pytestmark = pytest.mark.slow

CONTEXT, KINDS = 520, ("code", "maths")
OPTIONS = {"context": CONTEXT, "budget": 0.5, "families": KINDS, "documents": 2, "texts": 4, "progress": False}


@pytest.fixture(scope="module")
def small(tokenizer):
    return Small(tokenizer)


@pytest.fixture(scope="module")
def model():
    config = CONFIGS["llama"]()
    config.num_hidden_layers, config.max_position_embeddings = 2, 1024
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families") / "kept"


@pytest.fixture(scope="module")
def result(model, small, folder):
    return run(model, small, checkpoint=folder, **OPTIONS)


def test_every_plan_is_calibrated_on_its_domain_and_seed_and_saved(result, folder):
    assert [(p["calibrated_on"], p["seed"]) for p in result["plans"]] == [
        (name, seed) for seed in (0, SEED_DISTANCE) for name in (DEFAULT, *KINDS)
    ]
    for made in result["plans"]:
        plan = Plan.load(folder / f"{made['name']}.json")
        kinds = ["prose", "code", "maths", "chat"] if made["calibrated_on"] == DEFAULT else [made["calibrated_on"]] * 4
        assert [one["text"] for one in plan.calibration["documents"]] == kinds
        assert plan.kv_budget(CONTEXT) <= 0.5
    assert json.loads(json.dumps(result)) == result


def test_one_domain_gives_as_many_different_documents(small):
    def made(domains, seed=0):
        return [one.ids for one in _documents(small, CONTEXT, CONTEXT, domains, seed)]

    default = made(("prose", "code", "maths", "chat"))
    own, other = made(("maths",)), made(("maths",), SEED_DISTANCE)
    assert len(own) == len(default) == 4
    assert default[2] == own[0]
    assert len({tuple(ids) for ids in own + other}) == 8
    assert made(("code", "maths")) == [default[1], own[0], made(("code",))[1], own[1]]


def test_a_cell_equals_running_the_plans(result, model, small, folder):
    cells = {(c["calibrated_on"], c["tested_on"]): c for c in result["cells"]}
    assert list(cells) == [(a, b) for a in (DEFAULT, *KINDS) for b in KINDS]
    first = document(small, CONTEXT - 256, split="heldout", seed=0, domains=("code",), continuation=256)
    scored = score(model, [Plan.load(folder / "maths-0.json")], first)[0]
    kept = [json.loads(path.read_text()) for path in sorted((folder / "tested").glob("code-*.json"))]
    record = kept[0]["maths-0"]
    assert record["kl"] == pytest.approx(scored[0].kl.tolist(), abs=1e-6)
    assert (record["asked"], record["right"]) == (len(scored) - 1, sum(one.right_plan for one in scored[1:]))
    both = [[one[f"maths-{seed}"] for one in kept] for seed in (0, SEED_DISTANCE)]
    kl = torch.tensor([row["kl"] for rows in both for row in rows], dtype=torch.float64)
    cell = cells["maths", "code"]
    assert cell["kl"] == pytest.approx(float(kl.mean()))
    assert cell["interval"][0] <= cell["kl"] <= cell["interval"][1]
    assert cell["asked"] == sum(row["asked"] for rows in both for row in rows)


def test_the_advantage_is_paired_and_noise_is_measured(result):
    cells = {(c["calibrated_on"], c["tested_on"]): c["kl"] for c in result["cells"]}
    for one in result["advantage"]:
        own = cells[one["tested_on"], one["tested_on"]]
        assert one["kl"] == pytest.approx(cells[one["calibrated_on"], one["tested_on"]] - own)
        assert one["calibrated_on"] != one["tested_on"]
    single = [one["kl"] for one in result["advantage"] if one["calibrated_on"] != DEFAULT]
    assert result["own"]["kl"] == pytest.approx(sum(single) / len(single))
    assert [one["tested_on"] for one in result["noise"]] == list(KINDS)
    agreement = {tuple(one["plans"]): one for one in result["agreement"]}
    assert set(agreement) >= {("code", "code"), ("code", "maths"), ("maths", "maths")}
    assert all(0 <= one["moved"] <= 1 for one in agreement.values())


def test_the_census_compares_halves_of_one_family_and_of_two(result):
    census = result["census"]
    assert [pair["families"] for pair in census["pairs"]] == [["code", "code"], ["code", "maths"], ["maths", "maths"]]
    for of in census["families"].values():
        assert sum(of["roles"].values()) == pytest.approx(1)
        assert 0 < of["keys"]["kept"]["mean"] <= 1
        assert of["scores"]["far"]["half"] >= 0
    for pair in census["pairs"]:
        assert 0 <= pair["other_role"] <= 1
        assert 0 <= pair["scores"]["local"]["beyond_chance"] <= 1
    assert set(result["overlap"]["code"]) == {"texts", "documents"}


def test_it_resumes_from_its_checkpoint(result, model, small, folder, monkeypatch):
    lost = folder / "tested" / "maths-0.json"
    before, kept = lost.read_text(), (folder / "code-0.json").stat().st_mtime_ns
    lost.unlink()
    assert run(model, small, checkpoint=folder, **OPTIONS) == result
    assert lost.read_text() == before
    assert (folder / "code-0.json").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ("code",)}, "domains: code is only one; give two or more of prose, code, maths, chat, qa"),
        ({"families": ("code", "random")}, "domains: 'random' given; one or more of prose, code, maths, chat, qa"),
        ({"texts": 5}, r"texts: 5 must be even and 4 or more; give 4, 6"),
        ({"documents": 0}, "documents: 0 is too few; give 1 or more"),
        ({"documents": 50}, "documents, texts: 50 is too many; give at most 24"),
        ({"budget": 0.25}, "was made with other settings; name another one, or remove it"),
    ],
)
def test_errors_name_the_option(options, message, result, model, small, folder, tmp_path):
    place = folder if "budget" in options else tmp_path / "new"
    with pytest.raises(HeadsinkError, match=message):
        run(model, small, checkpoint=place, **OPTIONS | options)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(HeadsinkError, match="is not a folder of this measurement"):
        run(model, small, checkpoint=tmp_path, **OPTIONS)


def test_output_of_the_command(result):
    text = table(result)
    assert text.splitlines()[1].split()[:4] == ["calibrated", "on", "code", "maths"]
    assert "beyond a family's own" in text
    assert f"{result['cells'][0]['kl']:.4f}" in text


def test_only_files_of_the_run_are_cleared(tmp_path):
    folder = tmp_path / "kept"
    (folder / "tested").mkdir(parents=True)
    ours = ["default-0.json", "prose-0.json", "code-1000.json", "tested/prose-0.json", "tested/code-1.json"]
    for name in [*ours, "notes.md", "tested/notes-0.json"]:
        (folder / name).write_text("{}")
    (folder / "settings.json").write_text(json.dumps({"families": ["prose", "code"], "seed": 0, "documents": 2}))
    clear(folder)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {"notes.md", "tested/notes-0.json"}
