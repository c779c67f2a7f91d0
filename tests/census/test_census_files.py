"""Folders of a census and its checkpoint: the user's files are kept, and a damaged folder is refused in one line."""

import json
import shutil
import sys
from contextlib import suppress

import pytest
import torch
from disks import full_disk
from families import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_census import OPTIONS, Letters, same

import headsink
from headsink import HeadsinkError
from headsink.census import run
from headsink.census.results import Census
from headsink.cli import main
from headsink.cli.analyze_output import census_json, print_census
from headsink.plan.plan import Plan

# Files of the user


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def census(model):
    return headsink.analyze(model, Letters(), **OPTIONS)


@pytest.fixture(scope="module")
def folder(census, tmp_path_factory):
    return census.save(tmp_path_factory.mktemp("census") / "a")


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("settings_json", ["{}", '{"headsink": "0.1.0", "editor.fontSize": 12}'])
def test_a_folder_with_settings_of_another_program_is_left_unchanged(model, tmp_path, settings_json):
    (tmp_path / "app" / "sub").mkdir(parents=True)
    (tmp_path / "app" / "settings.json").write_text(settings_json)
    (tmp_path / "app" / "sub" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(HeadsinkError, match="app is not a checkpoint of a census; name another folder"):
        headsink.analyze(model, Letters(), **OPTIONS, checkpoint=tmp_path / "app")
    assert tree(tmp_path) == before


def test_a_checkpoint_of_another_census_is_replaced_and_other_files_stay(model, census, tmp_path):
    kept = tmp_path / "kept"
    headsink.analyze(model, Letters(), **OPTIONS, checkpoint=kept)
    (kept / "notes.md").write_text("mine")
    (kept / "0004.safetensors").write_text("mine: that census has four texts, 0 to 3")
    two = {**OPTIONS, "domains": ("prose",)}
    headsink.analyze(model, Letters(), **two, checkpoint=kept)
    mine = {"notes.md", "0004.safetensors"}
    assert tree(kept).keys() == {"0000.safetensors", "0001.safetensors", run.SETTINGS, *mine}
    run.remove_checkpoint(kept)
    assert tree(kept).keys() == mine
    run.remove_checkpoint(kept)  # it has no settings now, so it is foreign
    assert tree(kept).keys() == mine


def test_a_checkpoint_that_is_a_file_or_a_link_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(HeadsinkError, match=f"{name} is not a folder; name a new one"):
            headsink.analyze(model, Letters(), **OPTIONS, checkpoint=tmp_path / name)


def test_an_invalid_result_in_a_checkpoint_is_recomputed(model, census, tmp_path):
    kept = tmp_path / "kept"
    headsink.analyze(model, Letters(), **OPTIONS, checkpoint=kept)
    arrays = load_file(kept / "0001.safetensors")
    save_file({**arrays, "16.scores": torch.zeros(2, 2)}, kept / "0001.safetensors")
    assert same(headsink.analyze(model, Letters(), **OPTIONS, checkpoint=kept), census)


def test_resaving_keeps_the_users_files(census, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "a")
    names = tree(folder).keys()
    (folder / "my-notes.md").write_text("mine")
    (folder / "figure-mine.png").write_text("mine")
    census.save(folder)
    assert tree(folder).keys() == {*names, "my-notes.md", "figure-mine.png"}
    assert (folder / "my-notes.md").read_text() == (folder / "figure-mine.png").read_text() == "mine"
    assert same(Census.load(folder), census)


def test_a_plan_replaces_a_foreign_file_by_force_only(model, tmp_path):
    plan, path = Plan.full(model), tmp_path / "plan.json"
    path.write_text("years of work")
    with pytest.raises(HeadsinkError, match="headsink did not write the file that is there"):
        plan.save(path)
    assert path.read_text() == "years of work"
    assert Plan.load(plan.save(path, force=True)) == plan
    assert Plan.load(plan.save(path)) == plan  # now it is a plan of headsink


def test_a_full_disk_is_one_line_and_leaves_nothing(model, census, tmp_path):
    with full_disk(20_000), pytest.raises(HeadsinkError, match=r"cannot write .*: the file would be larger"):
        census.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    with full_disk(5_000), pytest.raises(HeadsinkError, match=r"cannot write .*: the file would be larger"):
        headsink.analyze(model, Letters(), **OPTIONS, checkpoint=tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").glob("*.safetensors")] == []


# Names of domains


@pytest.mark.parametrize(
    "name", ["", " ", "a\u2028b", "a\x00b", "a\nb", "a\u202eb", "a\u200bb", "a/b", "a\\b", "..", "a@b", "a:b", "\ud800"]
)
def test_a_domain_needs_a_printable_name(name, model, monkeypatch):
    monkeypatch.setattr(run, "_read", lambda *_: pytest.fail("a text was read"))
    with pytest.raises(
        HeadsinkError, match=r"texts: the kind .* is not a name of visible characters without \. @ : / "
    ):
        headsink.analyze(model, Letters(), texts={name: ["some text " * 9]}, progress=False)


def test_any_visible_name_is_accepted(model, tmp_path):
    names = ["Größe", "模型 文本", "<b>'\"&{{7*7}}`$x", "😀"]
    texts = {name: ["some text " * 9] for name in names}
    found = headsink.analyze(model, Letters(), texts=texts, lengths=(16,), progress=False)
    assert Census.load(found.save(tmp_path / "a")).domains == names


def test_half_of_a_surrogate_pair_is_refused(model):
    with pytest.raises(HeadsinkError, match="texts: number 1 of own is not text: it holds half of a surrogate pair"):
        headsink.analyze(model, Letters(), texts=["some text " * 9, "\ud800" * 99], progress=False)


# Reruns


def test_a_model_named_only_in_a_file_is_not_downloaded(folder, tmp_path, monkeypatch, capsys):
    changed = shutil.copytree(folder, tmp_path / "a")
    found = json.loads((changed / "census.json").read_text())
    found["model"]["source"] = "attacker/model"
    (changed / "census.json").write_text(json.dumps(found))
    asked = []

    def load(source, **_):
        asked.append(source)
        raise HeadsinkError("loaded")

    monkeypatch.setattr(headsink, "load", load)
    for model in ([], ["owner/name"]):
        words = ["headsink", "analyze", *model, "--rerun", str(changed), "--out", str(tmp_path / "b")]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit):
            main.main()
    first, second = capsys.readouterr().err.splitlines()
    assert "was made with the model 'attacker/model', which is not on this machine" in first
    assert first.endswith(f"name it: headsink analyze MODEL --rerun {changed}")
    assert (asked, second) == (["owner/name"], "headsink: loaded")


# Damaged folders

CASES = [
    (("layers",), "two", "census.json: model.layers: Input should be a valid integer"),
    (("layers",), 10**9, "sliding: 3 given for 1000000000 layers"),
    (("kv_heads",), 0, "model.kv_heads: Input should be greater than 0"),
    (("kv_heads",), 3, "4 query heads cannot share 3 KV heads"),
    (("query_heads",), 2, "does not fit the settings"),
    (("numbers",), [0, 1], "numbers: 2 given for 3 layers"),
    (("numbers",), [0, 2, 2], "numbers: they must increase"),
]


@pytest.mark.parametrize(("place", "value", "reason"), CASES)
def test_invalid_settings_are_named(place, value, reason, folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "a")
    found = json.loads((changed / "census.json").read_text())
    found["model"][place[0]] = value
    (changed / "census.json").write_text(json.dumps(found))
    with pytest.raises(HeadsinkError, match=reason) as error:
        Census.load(changed)
    assert str(error.value).startswith(f"{changed}: not a census folder, or damaged: ")


@pytest.mark.parametrize(
    ("name", "number", "reason"),
    [
        ("0.16.top", 99, "0.16.top has a number outside -1 to 15"),
        ("0.16.secondary", 16, "0.16.secondary has a number outside -1 to 15"),
        ("0.ids", -1, "0.ids has a number outside 0 to"),
        ("0.ids", 999_999, "tokens.json: a token of text 0 is missing"),
    ],
)
def test_numbers_out_of_range_are_located(name, number, reason, folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "a")
    arrays = load_file(changed / "arrays.safetensors")
    arrays[name].flatten()[0] = number
    save_file(arrays, changed / "arrays.safetensors")
    with pytest.raises(HeadsinkError, match=reason):
        Census.load(changed)


@pytest.mark.parametrize("name", ["census.json", "tokens.json", "arrays.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'{"a": 1}', b'{"3": "\\ud800"}']
)
def test_files_of_something_else_are_one_line(name, content, folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "a")
    (changed / name).write_bytes(content)
    with pytest.raises(HeadsinkError, match="not a census folder, or damaged: "):
        Census.load(changed)


def places(value, path=()):
    """Return the paths of all values in parsed JSON."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed_at(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = changed_at(value[path[0]], path[1:], new)
    return copy


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 15, 17, 99, 101, 2**31, 2**63, 10**9, 10**300]),
    st.sampled_from([0.5, -1e300, float("nan"), float("inf")]),
    st.sampled_from(["", "two", "\ud800", "a\nb", "random"]),
    st.sampled_from([[], [16], [16, 100, 200], {}, {"a": []}, [[]], [None] * 3]),
)
DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64, torch.float16, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def use(folder):
    """Do everything that `show` and `compare` do with a run."""
    found = Census.load(folder)
    print_census(Console(file=open("/dev/null", "w")), found)  # noqa: SIM115
    json.dumps(census_json(found))
    headsink.compare(folder, found)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_folder_works_or_is_refused(data, census, folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("headsink.census.first_layer.PERMUTATIONS", 10)  # fewer permutations, for speed
    monkeypatch.setattr("headsink.census.first_layer.AT_ONCE", 10)
    changed = tmp_path_factory.mktemp("mutated") / "a"
    changed.mkdir()
    found = json.loads((folder / "census.json").read_text())
    arrays = {name: array.clone() for name, array in census.arrays.items()}
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            found = changed_at(found, data.draw(st.sampled_from(list(places(found)))), data.draw(VALUES))
            if not isinstance(found, dict):
                break
        else:
            name = data.draw(st.sampled_from(sorted(arrays)))
            array = arrays[name]
            match data.draw(st.sampled_from(["dtype", "shape", "number", "missing", "renamed"])):
                case "dtype":
                    arrays[name] = array.nan_to_num().to(data.draw(st.sampled_from(DTYPES)))
                case "shape":
                    arrays[name] = torch.zeros(data.draw(SHAPES), dtype=array.dtype)
                case "number" if array.numel():
                    array.flatten()[data.draw(st.integers(0, array.numel() - 1))] = data.draw(
                        st.sampled_from([-2, -1, 0, 15, 16, 99, 100])
                        if array.dtype == torch.int32
                        else st.sampled_from([-1.0, 0.0, 2.0, float("nan"), float("inf"), -float("inf")])
                    )
                case "missing":
                    del arrays[name]
                case "renamed":
                    arrays[data.draw(st.sampled_from(["", "9.ids", "0.", "0.99.scores", "x"]))] = arrays.pop(name)
    (changed / "census.json").write_text(json.dumps(found))
    shutil.copy(folder / "tokens.json", changed)
    save_file({name: array.contiguous() for name, array in arrays.items()}, changed / "arrays.safetensors")
    with suppress(HeadsinkError):
        use(changed)
    shutil.rmtree(changed)
