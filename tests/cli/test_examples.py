"""The scripts in examples/ run, and do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

from headsink import Pattern, Plan, load

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "The lighthouse keeper counted ships. On Monday there were seven of them, and on Tuesday none came by. " * 4


@pytest.fixture(scope="module")
def files(tiny_folder, tmp_path_factory):
    """A text, and a plan of windows for the tiny model."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    plan = Plan.uniform(load(str(tiny_folder))[0], Pattern(4, 0, 28))
    plan.save(folder / "plan.json")
    return folder


def run(script, *words):
    command = [sys.executable, EXAMPLES / script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_document_is_compressed_and_asked_twice(files, tiny_folder):
    words = ("--file", files / "text.txt", "--model", tiny_folder, "--plan", files / "plan.json", "--tokens", 4)
    lines = run("compress_document.py", "How many?", "And when?", *words).splitlines()
    assert "tokens are read; the KV cache holds 0.0" in lines[0]
    assert [lines[2], "And when?" in lines] == ["How many?", True]


def test_chat_memory_is_bounded(files, tiny_folder):
    words = ("--model", tiny_folder, "--plan", files / "plan.json", "--tokens", 4)
    out = run("chat.py", "Hello there, who are you?", "And what is your name?", *words)
    assert out.count("KV cache 0.0") == 2


def test_census_of_a_prompt(files, tiny_folder, tmp_path):
    out = run(
        "census_of_a_prompt.py", "--file", files / "text.txt", "--model", tiny_folder, "--out", tmp_path / "census"
    )
    assert out.startswith("layer ")
    assert (tmp_path / "census" / "report.html").is_file()


def test_a_batch_of_prompts(files, tiny_folder):
    prompts = ("Once upon a time", "The capital of France, as everybody knows, is")
    out = run("batch.py", *prompts, "--model", tiny_folder, "--tokens", 4)
    assert all(prompt in out for prompt in prompts)
