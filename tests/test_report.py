"""The report: self-contained, escaped, and without an error in a browser where there is one."""

import shutil
import subprocess

import pytest
import torch
from families import tiny

import headsink
from headsink.report.page import share, sink_tokens

MARKUP = "<img src=x onerror=alert(1)></script>"


class Markup:
    """A tokenizer whose every token is markup, as a prompt may hold."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(letter) % 200 for letter in text]}

    def decode(self, ids):
        return f"{MARKUP}{ids[0]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    census = headsink.analyze(tiny("llama"), Markup(), lengths=(16, 200), texts_per_domain=2, progress=False)
    return census.save(tmp_path_factory.mktemp("report") / "census")


def test_markup_in_a_text_shows_as_text(folder):
    body = (folder / "report.html").read_text().split("</head>\n<body>")[1]
    assert "<img" not in body
    assert "&lt;img␣src=x" in body
    assert body.count("</script>") == 1


def test_it_needs_no_network(folder):
    page = (folder / "report.html").read_text()
    head, body = page.split("</head>\n<body>")
    assert "<link" not in page.split("<script>")[0]
    assert 'src="' not in body
    assert "<script>" in head
    assert len(page) < 10_000_000


def test_what_is_loaded_is_what_was_saved(folder):
    census = headsink.Census.load(folder)
    assert census.lengths == [16, 200]
    assert census.arrays["prose.0.200.attention"].shape == (3, 4, 200)
    torch.testing.assert_close(
        census.arrays["maths.1.200.attention"].float().sum(-1), torch.ones(3, 4), rtol=0, atol=2e-2
    )
    tokens = sink_tokens(census, 200)
    assert all(0 < row["share"] <= 1 for row in tokens)
    assert share(0.5) == "50%"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine: the page is not opened")
def test_it_opens_in_a_browser_without_an_error(folder, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [
        "chromium",
        *flags,
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{folder}/report.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count('class="marks"') == 4
    assert done.stdout.count("<select") == 3
