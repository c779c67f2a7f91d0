"""headsink replaces and removes only files that it wrote, and reports unwritable outputs in one line."""

import json
import os
import socket
import stat
import sys
from pathlib import Path

import pytest
import torch
from browser import browser, needs_browser
from disks import full_disk
from safetensors.torch import save_file

from headsink.cli import main
from headsink.data import prompts
from headsink.errors import HeadsinkError, printable
from headsink.report import frontier as frontier_report
from headsink.utils import files, terminal

ESCAPES = "a\x1b]0;title\x07b\nc\u202ed\u2028e"


def fill(folder, force=False, **contents):
    with files.new_folder(folder, "m.json", force) as part:
        (part / "m.json").write_text("{}")
        for name, text in contents.items():
            (part / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "m.json"}


# devices, pipes, sockets, links


def device(path):
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


def pipe(path):
    os.mkfifo(path)


def listener(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def link(path):
    (path.parent / "target").write_text("mine")
    path.symlink_to("target")


def link_to_a_folder(path):
    (path.parent / "folder").mkdir()
    path.symlink_to("folder")


def link_to_nothing(path):
    path.symlink_to("nothing")


THINGS = {
    device: "it is a device",
    pipe: "it is a pipe",
    listener: "it is a socket",
    link: "it is a link",
    link_to_a_folder: "it is a link",
    link_to_nothing: "it is a link",
}


@pytest.mark.parametrize("make", THINGS)
def test_only_regular_files_are_replaced(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path = Path("thing")
    try:
        make(path)
    except PermissionError:
        pytest.skip("only root may make a device here")
    before = path.lstat()
    for force in (False, True):
        with pytest.raises(HeadsinkError, match=f"cannot write thing: {THINGS[make]}, name a file"):
            files.check_file(path, force)
        with pytest.raises(HeadsinkError, match=f"cannot write thing: {THINGS[make]}, name a file"):
            files.write_text(path, "x", force)
        with pytest.raises(HeadsinkError, match=f"cannot write thing: {THINGS[make]}, name a folder"):
            files.check_replaceable(path, "m.json", force)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert {p.name for p in Path().iterdir()} <= {"thing", "target", "folder"}


def test_unwritable_outputs_are_refused_before_the_work():
    with pytest.raises(HeadsinkError, match=r"cannot write /proc/plan\.json"):
        files.check_file("/proc/plan.json")
    with pytest.raises(HeadsinkError, match="/dev/null is a file, not a folder"):
        files.check_file("/dev/null/plan.json")


# foreign files


OWN = {
    "plan": '{\n "schema_version": 5,\n "headsink": "0.1.0",\n "model": {}}',
    "with a byte order mark": '\ufeff{"headsink": "0.1.0"}',
    "results": json.dumps({"what": "x", "command": "python x", "versions": {"headsink": "0.1.0"}}),
    "from sources": json.dumps({"what": "x", "versions": {"headsink": None}}),
    "row": json.dumps({"row": "a", "command": "headsink bench all --out DIR"}),
    "JSON lines": '{"versions": {"headsink": "0.1.0"}}\n{"item": 1}\n',
    "report": '<!DOCTYPE html>\n<html><head>\n<meta name="generator" content="headsink">',
    "page of results": "# Results\n\nMade by `headsink bench results rows`",
}
OTHERS = {
    "notes": "years of work on headsink",
    "a script": 'import headsink\nfound = {"headsink": 1}\n',
    "JSON": '{"name": "headsink"}',
    "a list": '[{"headsink": "0.1.0"}]',
    "a page": "<!DOCTYPE html>\n<html><head><title>headsink</title>",
    "Markdown": "# Results\n\nI measured `headsink bench results`",
}


@pytest.mark.parametrize("kind", OWN)
def test_a_file_that_headsink_wrote_is_replaced(kind, tmp_path):
    path = tmp_path / "file"
    path.write_text(OWN[kind], encoding="utf-8")
    assert files.write_text(path, "new").read_text() == "new"


@pytest.mark.parametrize("kind", OTHERS)
def test_a_foreign_file_is_replaced_by_force_only(kind, tmp_path):
    path = tmp_path / "file"
    path.write_text(OTHERS[kind])
    with pytest.raises(HeadsinkError, match=r"headsink did not write the file that is there; .* --force"):
        files.check_file(path)
    with pytest.raises(HeadsinkError, match="headsink did not write the file that is there"):
        files.write_text(path, "new")
    assert path.read_text() == OTHERS[kind]
    assert files.write_text(path, "new", force=True).read_text() == "new"


def test_an_empty_file_can_be_written(tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert files.write_text(path, "new").read_text() == "new"


def test_a_prefix_is_recognised_by_its_header(tmp_path):
    for name, metadata in (("ours", {"headsink": "{}"}), ("theirs", {"format": "pt"}), ("bare", None)):
        save_file({"headsink": torch.zeros(3)}, tmp_path / name, metadata)
    assert [files.is_ours(tmp_path / name) for name in ("ours", "theirs", "bare")] == [True, False, False]


# folders


def test_foreign_files_stay_in_a_rewritten_folder(tmp_path):
    fill(tmp_path / "f", a="1", b="1")
    (tmp_path / "f" / "notes").write_text("mine")
    (tmp_path / "f" / "sub").mkdir()
    (tmp_path / "f" / "sub" / "thesis").write_text("mine")
    fill(tmp_path / "f", a="2", c="2")
    assert (tmp_path / "f" / "sub" / "thesis").read_text() == "mine"
    (tmp_path / "f" / "sub" / "thesis").unlink()
    (tmp_path / "f" / "sub").rmdir()
    assert contents(tmp_path / "f") == {
        "a": "2",
        "c": "2",
        "notes": "mine",
    }  # b was in the old list and is not in the new one
    assert json.loads((tmp_path / "f" / "m.json").read_text())["files"] == ["a", "c", "m.json"]


def test_a_foreign_file_is_not_replaced_in_a_folder(tmp_path):
    fill(tmp_path / "f", a="1")
    (tmp_path / "f" / "b").write_text("mine")
    with pytest.raises(HeadsinkError, match="headsink did not write b in it; move it elsewhere"):
        fill(tmp_path / "f", a="2", b="2")
    assert contents(tmp_path / "f") == {"a": "1", "b": "mine"}
    fill(tmp_path / "f", force=True, a="2", b="2")
    assert contents(tmp_path / "f") == {"a": "2", "b": "2"}


@pytest.mark.parametrize(
    "marker", ["{}", '{"headsink": "0.1.0"}', '{"headsink": "0.1.0", "files": ["../thesis"]}', "["]
)
def test_a_folder_without_a_file_list_is_foreign(marker, tmp_path):
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "m.json").write_text(marker)
    (tmp_path / "f" / "a").write_text("mine")
    with pytest.raises(HeadsinkError, match="the folder holds other files; name a new or an empty one"):
        fill(tmp_path / "f", a="2")
    assert contents(tmp_path / "f") == {"a": "mine"}
    assert (tmp_path / "thesis").read_text() == "mine"


def test_an_empty_folder_is_filled_in_place(tmp_path, monkeypatch):
    """It may be a mount point or the shell's working directory, which cannot be moved."""
    monkeypatch.chdir(tmp_path)
    before = Path().stat().st_ino
    fill(".", a="1")
    assert contents(Path()) == {"a": "1"}
    assert Path().stat().st_ino == before


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
        with files.new_file(tmp_path / "b") as part:
            save_file({"x": torch.zeros(3)}, part)
        fill(tmp_path / "f", a="1")
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "b", "f", "f/a", "f/m.json")]
    assert modes == [0o640, 0o640, 0o750, 0o640, 0o640]


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    """The umask belongs to the process: if it were 0 for a moment, other threads could create world-writable files."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    files.write_text(tmp_path / "a", "x")
    fill(tmp_path / "f", a="1")
    assert contents(tmp_path / "f") == {"a": "1"}


# a full disk


def test_a_full_disk_is_one_line_whoever_writes(tmp_path):
    def text(part):
        part.write_text("x" * 10_000)

    def tensors(part):
        save_file({"x": torch.zeros(10_000)}, part, {"headsink": "1"})

    for write in (text, tensors):
        with full_disk(), pytest.raises(HeadsinkError) as error, files.new_file(tmp_path / "file") as part:
            write(part)
        assert str(error.value) == f"cannot write {tmp_path / 'file'}: the file would be larger than is allowed here"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["models"], ["models", "--json"]])
def test_standard_output_on_a_full_disk_is_one_line(words, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["headsink", *words])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            main.main()
    assert stop.value.code == 2
    assert capfd.readouterr().err == "headsink: cannot write standard output: the disk is full\n"


# text


def test_prompts_are_split_at_line_feeds_only(tmp_path):
    text = "one\u2028two\x85three\x0bfour\x0cfive\x1csix\rseven"
    (tmp_path / "p.txt").write_bytes(f"\ufeff{text}\r\n\r\nnext\n".encode())
    assert prompts.read([], [tmp_path / "p.txt"], []) == {"own": [text, "next"]}
    lines = [json.dumps({"prompt": text, "domain": "a"}, ensure_ascii=False), json.dumps(text, ensure_ascii=False)]
    (tmp_path / "p.jsonl").write_bytes("\ufeff{}\r\n{}\n".format(*lines).encode())
    assert prompts.read([], [tmp_path / "p.jsonl"], []) == {"a": [text], "own": [text]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "line 1 of .* is not JSON"),
        ('{"prompt": "\\ud800"}', "prompt: one of them is not text: it holds half of a surrogate pair"),
        ('{"prompt": "x", "domain": "a\\u2028b"}', r"domain 'a\\u2028b' is not a name of visible characters"),
        ('{"prompt": "x", "domain": "../b"}', "is not a name of visible characters"),
        ('{"prompt": "x", "domain": " "}', "is not a name of visible characters"),
        ('{"prompt": "x", "domain": 3}', "is not a name of visible characters"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_one_line(line, reason, tmp_path):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(HeadsinkError, match=reason):
        prompts.read([], [tmp_path / "p.jsonl"], [])


def test_names_from_files_are_escaped_in_the_terminal(monkeypatch, capsys):
    escaped = r"a\x1b]0;title\x07b\nc\u202ed\u2028e"
    assert printable(ESCAPES) == escaped == printable(escaped)
    assert printable("Größe 模型 😀") == "Größe 模型 😀"
    assert str(HeadsinkError(f"model: {ESCAPES}")) == f"model: {escaped}"
    monkeypatch.setattr(main, "app", lambda **_: terminal._fail(ESCAPES))
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == f"headsink: {escaped}\n"
    table = terminal.new_table("names", "name")
    table.add_row(ESCAPES)
    terminal.out.print(table)
    assert escaped in capsys.readouterr().out


def write_hostile_frontier(folder):
    interval = [0.1, 0.2]
    point = {"budget": 0.5, "kept": 0.5, "kl": 0.1, "kl_interval": interval, "top1": 0.9, "nll_plan": 2, "nll_full": 1}
    point["retrieval"] = [{"asked": 4, "right_plan": 3, "right_full": 4}]
    points = [point, point | {"budget": 0.7, "kept": 0.7}]
    advice = "</script><script>document.title = 'theirs'</script>"
    frontier_report.write_chart({"advice": advice, "least_sound_budget": 0.5, "points": points}, folder)


@pytest.mark.slow
def test_the_chart_of_a_frontier_runs_no_foreign_scripts(tmp_path):
    write_hostile_frontier(tmp_path)
    page = (tmp_path / "frontier.html").read_text()
    assert "Content-Security-Policy\" content=\"default-src 'none';" in page
    assert "<script>document" not in page
    assert files.is_ours(tmp_path / "frontier.html")


@pytest.mark.slow
@needs_browser
def test_the_chart_of_a_frontier_is_drawn_in_a_browser(tmp_path):
    write_hostile_frontier(tmp_path)
    with browser(tmp_path / "profile") as opened:
        opened.open((tmp_path / "frontier.html").as_uri())
        assert opened.run("return document.title") == "Quality against budget"
        assert opened.run("return document.querySelectorAll('#frontier svg.marks').length") == 1
        assert opened.console() == []
