"""The report: self-contained, escaped, small, and an instrument that works by mouse and by keyboard."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch
from browser import INSTALLED, browser
from families import tiny

import headsink
from headsink.report import write_comparison, write_comparison_pictures
from headsink.report.page import share
from headsink.report.views import FAINTEST, STATISTICS, STEPS, one_byte, token_views

MARKUP = "<img src=x onerror=alert(1)></script>"
KIND = "<img src=x onerror=alert(1)>"  # a kind of text may not hold a slash
LAYERS, HEADS = 3, 4
needs_browser = pytest.mark.skipif(not INSTALLED, reason="no chromium and chromedriver here: the page is not opened")


class Markup:
    """A tokenizer whose every token is markup, as a prompt may hold."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(letter) % 200 for letter in text]}

    def decode(self, ids):
        return f"{MARKUP}{ids[0]}"


@pytest.fixture(scope="module")
def census():
    torch.manual_seed(0)
    letters = [chr(40 + 7 * n % 61) for n in range(400)]
    texts = {
        "prose": ["".join(letters[:220]), "".join(letters[100:320])],
        KIND: ["".join(letters[50:280]), "".join(letters[9:90])],  # the second does not reach every length
        "short": ["".join(letters[7:80])],
    }
    found = headsink.analyze(tiny("llama"), Markup(), texts=texts, lengths=(16, 64, 200), progress=False)
    found.settings["model"]["name"] = f"tiny {MARKUP}"
    return found


@pytest.fixture(scope="module")
def folder(census, tmp_path_factory):
    return census.save(tmp_path_factory.mktemp("report") / "census")


@pytest.fixture(scope="module")
def comparison(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"
    other = headsink.Census.load(folder)
    other.settings["seed"] = MARKUP
    write_comparison(headsink.compare(f"{folder}:prose", other, f"{folder}@64:short"), path)
    return path


def markup_free(page):
    """The page without what its own scripts and style sheet say."""
    return re.sub(r"<(script|style)\b[^>]*>.*?</\1>", "", page, flags=re.DOTALL)


def unpack(page, name):
    """What views.packed wrote into a script element."""
    raw = gzip.decompress(base64.b64decode(re.search(f'id="{name}">([^<]*)<', page)[1]))
    size = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + size])
    arrays = {
        key: np.frombuffer(raw, f"<{kind}", int(np.prod(shape)), 4 + size + offset).reshape(shape)
        for key, (kind, offset, shape) in header["arrays"].items()
    }
    return header, arrays


@pytest.fixture(params=["report", "comparison"])
def page(request, folder, comparison):
    return (folder / "report.html" if request.param == "report" else comparison).read_text()


def test_markup_in_a_text_is_escaped(page):
    body = markup_free(page)
    assert "<img" not in body
    assert "<script" not in body
    assert "</script" not in body


def test_a_token_with_markup_is_there_as_text(folder):
    assert "&lt;img␣src=x␣onerror=alert(1)&gt;&lt;/script&gt;" in markup_free((folder / "report.html").read_text())


def test_nothing_is_fetched(page):
    assert "default-src 'none'" in page
    assert not re.search(r'<link|<iframe|(src|href)="(?!#)', markup_free(page))
    assert len(page) < 10_000_000


def test_the_page_holds_the_numbers_of_the_census(census, folder):
    header, arrays = unpack((folder / "report.html").read_text(), "data")
    assert header["domains"] == ["all texts", "prose", KIND, "short"]
    assert header["has"] == {"16": [0, 1, 2, 3], "64": [0, 1, 2, 3], "200": [0, 1, 2]}
    value = arrays["200.1.value"][list(STATISTICS).index("sink")]
    np.testing.assert_allclose(value, census.score("sink", 200, "prose"), rtol=1e-3)
    half = arrays["64.2.half"][list(STATISTICS).index("local")]
    np.testing.assert_allclose(half, census.interval("local", 64, KIND).half, rtol=1e-3)
    assert [text["lengths"] for text in header["texts"]] == [[16, 64, 200]] * 3 + [[16, 64]] * 2
    words = [header["words"][place] for place in arrays["ids.0"]]
    assert words == [census.vocabulary[token] for token in census.arrays["0.ids"].tolist()]


def test_every_kind_of_text_can_be_shaded(census, folder):
    assert token_views(census) == {0: (200, 200), 2: (200, 200), 4: (64, 64)}
    page = (folder / "report.html").read_text()
    for text, (length, _) in token_views(census).items():
        header, arrays = unpack(page, f"text-{text}")
        assert header["length"] == length
        shade = arrays["attention"].astype(float)
        attention = np.where(shade > 0, FAINTEST ** (1 - (shade - 1) / STEPS), 0)
        np.testing.assert_allclose(attention, census.arrays[f"{text}.{length}.attention"], rtol=0.04, atol=2e-6)


def test_a_text_is_cut_where_the_page_would_grow_heavy(census, monkeypatch):
    monkeypatch.setattr("headsink.report.views.SHADES", 40 * LAYERS * HEADS * 3)
    assert token_views(census) == {0: (200, 40), 2: (200, 40), 4: (64, 40)}


def test_one_byte_keeps_none_and_all():
    assert one_byte(torch.tensor([0.0, FAINTEST, 1.0])).tolist() == [0, 1, 1 + STEPS]


def test_every_chart_is_a_picture(folder):
    names = {path.stem.removeprefix("figure-") for path in folder.glob("figure-*.png")}
    assert names == {path.stem.removeprefix("figure-") for path in folder.glob("figure-*.svg")}
    assert {"sink-16", "sink-200", "entropy-200", "window-first-200", "roles-64", "layers-200", "errors-200"} < names
    assert {"pairs-200", "windows", "law", "norms", "tau", "lengths", "roles-by-text", "same-roles"} < names
    svg = (folder / "figure-sink-200.svg").read_text()
    assert "<img" not in svg
    assert "&lt;img" in svg
    png = (folder / "figure-sink-200.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") > 3 * int(re.search(r'width="(\d+)', svg)[1]) - 3


def test_a_comparison_is_pictures_too(folder, tmp_path):
    write_comparison_pictures(headsink.compare(folder, f"{folder}@64"), tmp_path)
    assert (tmp_path / "figure-change-sink-64.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figure-change-output-64.svg").read_text()


def test_a_share_that_is_not_there_is_a_dash():
    assert [share(0.5), share(None)] == ["50%", "–"]


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def report(chromium, folder):
    chromium.open(f"file://{folder}/report.html")
    yield chromium
    assert not chromium.dialog()
    assert chromium.console() == []
    assert chromium.run("return [...document.images].length") == 0


def text(page, element):
    return page.run("return document.getElementById(arguments[0]).textContent", element)


def choose(page, menu, value):
    page.run(
        "const menu = document.getElementById(arguments[0]); menu.value = arguments[1];"
        "menu.dispatchEvent(new Event('change')); return Promise.all(Object.values(queue)).then(() => null)",
        menu,
        str(value),
    )


def middle(page, layer, head):
    """Where a head lies on the map, in the viewport."""
    return page.run(
        "const cell = document.querySelectorAll('#map .layer_0_marks path')[arguments[0]];"
        "cell.scrollIntoView({block: 'center'});"
        "const box = cell.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]",
        layer * HEADS + head,
    )


@needs_browser
def test_it_opens_without_an_error_and_soon(chromium, folder, capsys):
    path = folder / "report.html"
    took = chromium.open(f"file://{path}")
    assert chromium.console() == []
    with capsys.disabled():
        print(f"\ntiny model's report: {path.stat().st_size / 1e6:.1f} MB, ready after {took:.0f} ms")  # noqa: T201
    charts = chromium.run(
        "return [...document.querySelectorAll('.chart')].filter(c => !c.querySelector('svg')).map(c => c.id)"
    )
    assert charts == []


@needs_browser
def test_a_click_on_the_map_shows_that_head(report, census):
    report.click(*middle(report, 2, 1))
    report.wait("return document.getElementById('head-title').textContent === 'Layer 2, head 1 (KV head 0)'")
    shown = report.run("return [...document.querySelectorAll('#scores tbody tr')].map(row => row.innerText)")
    value = float(census.score("sink", 200)[2, 1])
    assert any(line.startswith("sink tokens") and f"{value:.3g}" in line for line in shown)
    window = report.run("return drawn.window.view.data('errors').filter(row => row.chosen).map(row => row.error)")
    np.testing.assert_allclose(window, census.score("errors", 200)[2, 1].flatten(), rtol=1e-3, atol=1e-6)
    frame = report.run("return drawn.map.view.data('selected').map(row => [row.layer, row.head])")
    assert frame == [[2, 1]]
    assert "layer=2&head=1" in report.run("return location.hash")


@needs_browser
def test_arrow_keys_move_the_selected_head(report):
    report.click(*middle(report, 0, 0))
    report.run("document.getElementById('map-focus').focus()")
    report.press("down", "right", "right", "left", "up", "up")
    report.wait("return document.getElementById('head-title').textContent.startsWith('Layer 0, head 1 ')")
    assert text(report, "said").startswith("Layer 0, head 1: ")


@needs_browser
def test_tab_reaches_every_control(report):
    report.run("document.body.focus()")
    reached = []
    for _ in range(40):
        report.press("tab")
        reached.append(report.run("return document.activeElement.id"))
    assert {"length", "domain", "statistic", "layer", "head", "map-focus", "shaded", "tokens"} <= set(reached)


@needs_browser
def test_menus_change_what_is_shown(report, census):
    report.click(*middle(report, 1, 3))
    for length in census.lengths:
        choose(report, "length", length)
        value = float(census.score("sink", length)[1, 3])
        assert f"attention to sink tokens {value:.3g}" in text(report, "said")
    choose(report, "domain", 1)
    assert f"attention to sink tokens {float(census.score('sink', 200, 'prose')[1, 3]):.3g}" in text(report, "said")
    choose(report, "statistic", "role")
    assert text(report, "map-title") == "Role"
    report.wait("return document.querySelectorAll('#map text').length > 12")

    def on_the_map(value):
        shown = report.run("return drawn.map.view.data('heads').map(row => row.value)")
        np.testing.assert_allclose(shown, value.flatten(), rtol=1e-3, atol=1e-6)
        charted = report.run("return drawn.layers.view.data('heads').map(row => row.sink)")
        np.testing.assert_allclose(charted, census.score("sink", 200, "prose").flatten(), rtol=1e-3)

    for statistic in ("sink", "first", "entropy", "effective", "output", "legacy"):
        choose(report, "statistic", statistic)
        on_the_map(census.score(statistic, 200, "prose"))
    choose(report, "statistic", "window")
    on_the_map(census.window_needed(200, "prose"))
    colours = "return new Set([...document.querySelectorAll('#map .layer_0_marks path')].map(p => p.getAttribute('fill'))).size"
    assert report.run(colours) == len(census.window_needed(200, "prose").unique())
    for statistic in report.run("return [...document.getElementById('statistic').options].map(option => option.value)"):
        choose(report, "statistic", statistic)
    report.wait("return document.getElementById('map-title').textContent === 'Legacy score (row 0 counted)'")


@needs_browser
def test_a_kind_of_text_too_short_for_a_length_cannot_be_chosen_there(report):
    disabled = "return [...document.getElementById('domain').options].map(option => option.disabled)"
    assert report.run(disabled) == [False, False, False, True]
    choose(report, "length", 64)
    assert report.run(disabled) == [False] * 4
    choose(report, "domain", 3)
    choose(report, "length", 200)
    assert report.run("return document.getElementById('domain').selectedOptions[0].textContent") == "all texts"


@needs_browser
def test_every_text_can_be_shaded_and_read_as_text(report, census):
    for number, (length, _) in token_views(census).items():
        choose(report, "shaded", number)
        report.wait(f"return document.getElementById('tokens').dataset.text === '{number}'")
        spans = report.run("return [...document.getElementById('tokens').children].map(span => span.textContent)")
        assert spans == [census.vocabulary[token] for token in census.arrays[f"{number}.ids"][:length].tolist()]
        assert report.run("return document.querySelectorAll('#tokens .first-token').length") > 0
    report.run("document.getElementById('tokens').focus()")
    report.press("right", "right")
    assert MARKUP in text(report, "token-said")
    assert ", position 1: attention " in text(report, "token-said")


@needs_browser
def test_the_top_keys_show_markup_as_text(report):
    assert MARKUP in text(report, "keys")


@needs_browser
def test_a_view_can_be_linked(chromium, folder):
    chromium.open(f"file://{folder}/report.html#?layer=1&head=2&length=64&domain=short&statistic=entropy&text=2")
    assert text(chromium, "head-title").startswith("Layer 1, head 2 ")
    chosen = chromium.run(
        "return ['length', 'domain', 'statistic', 'shaded'].map(id => document.getElementById(id).value)"
    )
    assert chosen == ["64", "3", "entropy", "2"]
    assert chromium.console() == []


@needs_browser
def test_a_comparison_works_by_mouse_keyboard_and_menus(chromium, comparison, census):
    chromium.open(f"file://{comparison}")
    chromium.click(*middle(chromium, 2, 3))
    chromium.wait("return document.getElementById('head-title').textContent === 'Layer 2, head 3'")
    chromium.run("document.getElementById('map-focus').focus()")
    chromium.press("up", "left")
    chromium.wait("return document.getElementById('head-title').textContent === 'Layer 1, head 2'")
    for menu in ("score", "length", "run", "domain"):
        for value in chromium.run("return [...document.getElementById(arguments[0]).options].map(o => o.value)", menu):
            choose(chromium, menu, value)
            assert chromium.run("return document.querySelectorAll('#scores tbody tr').length") == 7
    choose(chromium, "run", chromium.run("return document.getElementById('run').options[1].value"))
    choose(chromium, "score", "local")
    shown = chromium.run("return drawn.map.view.data('heads').map(row => row.value)")
    after, before = census.score("local", 64, "short"), census.score("local", 64, "prose")
    assert shown == pytest.approx((after - before).flatten().tolist(), rel=1e-2, abs=1e-5)
    assert "of 12 heads have another role" in text(chromium, "roles-said")
    assert chromium.console() == []
