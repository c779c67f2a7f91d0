"""The report page: self-contained, escaped, small, and usable by mouse and by keyboard."""

import base64
import gzip
import json
import re
import struct
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from browser import PATIENCE, needs_browser
from families import tiny
from plans import random_plan

import headsink
from headsink.census.first_view import flat_keys, flat_profile, short
from headsink.census.head_statistics import distances
from headsink.census.views import STATISTICS, share_of_room, token_views, top_keys
from headsink.report import charts
from headsink.report.assets import write_picture
from headsink.report.comparison import write_comparison, write_comparison_pictures
from headsink.report.page import draw, write_page, write_report
from headsink.utils.format import share
from headsink.utils.pack import FAINTEST, STEPS, one_byte, two_figures

pytestmark = pytest.mark.slow

MARKUP = "<img src=x onerror=alert(1)></script>"
KIND = "<img src=x onerror=alert(1)>"  # the name of a domain must not contain a slash
LAYERS, HEADS = 3, 4
SHAPES = {"svg", "g", "path", "rect", "text", "line", "defs", "linearGradient", "stop", "clipPath"}


class Markup:
    """A tokenizer whose tokens are all markup, as a prompt may contain."""

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
        "markup": ["".join(letters[50:280]), "".join(letters[9:90])],  # the second is shorter than some lengths
        "short": ["".join(letters[7:80])],
    }
    found = headsink.analyze(tiny("llama"), Markup(), texts=texts, lengths=(16, 64, 200), progress=False)
    found.settings["model"]["name"] = f"tiny {MARKUP}"
    for text in found.settings["texts"]:  # a file may contain names that `analyze` refuses
        text["domain"] = text["domain"].replace("markup", KIND)
    return found


@pytest.fixture(scope="module")
def folder(census, tmp_path_factory):
    model = tiny("llama")
    return write_report(census, tmp_path_factory.mktemp("report") / "census", model=model, plan=random_plan(model, 1))


@pytest.fixture(scope="module")
def comparison(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"
    other = headsink.Census.load(folder)
    other.settings["seed"] = MARKUP
    write_comparison(headsink.compare(f"{folder}:prose", other, f"{folder}@64:short"), path)
    return path


def markup_free(page):
    """Return the page without its scripts and style sheet."""
    return re.sub(r"<(script|style)\b[^>]*>.*?</\1>", "", page, flags=re.DOTALL)


def unpack(page, name):
    """Decode what views.packed wrote into a script element."""
    raw = gzip.decompress(base64.b64decode(re.search(f'id="{name}">([^<]*)<', page)[1]))
    size = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + size])
    arrays = {}
    for key, (kind, offset, shape) in header["arrays"].items():
        if kind == "f4":  # the first bytes of all numbers, then the second bytes, ...
            flat = np.frombuffer(raw, np.uint8, 4 * int(np.prod(shape)), 4 + size + offset)
            arrays[key] = np.ascontiguousarray(flat.reshape(4, -1).T).view("<f4").reshape(shape)
        else:
            arrays[key] = np.frombuffer(raw, f"<{kind}", int(np.prod(shape)), 4 + size + offset).reshape(shape)
    return header, arrays


@pytest.fixture(params=["report", "comparison"])
def page(request, folder, comparison):
    return (folder / "report.html" if request.param == "report" else comparison).read_text()


def test_markup_in_a_text_is_escaped(page):
    body = markup_free(page)
    assert "<img" not in body
    assert "<script" not in body
    assert "</script" not in body


def test_a_token_with_markup_is_shown_as_text(folder):
    assert "&lt;img␣src=x␣onerror=alert(1)&gt;&lt;/script&gt;" in markup_free((folder / "report.html").read_text())


def test_the_page_loads_nothing_from_the_network(page):
    assert "default-src 'none'" in page
    assert not re.search(r'<link|<iframe|(src|href)="(?!#)', markup_free(page))
    assert len(page) < 5_000_000


def test_the_page_contains_the_numbers_of_the_census(census, folder):
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


def test_a_long_text_is_cut(census, monkeypatch):
    monkeypatch.setattr("headsink.census.views.SHADES", 40 * LAYERS * HEADS * 3)
    assert token_views(census) == {0: (200, 40), 2: (200, 40), 4: (64, 40)}


def test_a_model_with_many_heads_has_fewer_top_keys_and_shades(census, monkeypatch):
    whole, keys = token_views(census), top_keys(census, 0, 200)["top"]
    monkeypatch.setattr("headsink.census.views.MANY_HEADS", LAYERS * HEADS // 2)
    monkeypatch.setattr("headsink.census.views.SHADES", 40 * LAYERS * HEADS * 3)
    assert [shown for _, shown in token_views(census).values()] == [20, 20, 20]
    assert whole != token_views(census)
    assert top_keys(census, 0, 200)["top"].equal(keys[..., : keys.shape[-1] // 2])
    assert share_of_room(census) == 0.5


def test_two_figures_are_precise_to_half_a_percent():
    numbers = torch.tensor([0.0, 1.0, -1.0, 0.39177, 1.108894, 8192.0, 1e-6, torch.nan])
    np.testing.assert_allclose(two_figures(numbers), numbers, rtol=2**-8)
    assert not (two_figures(numbers).view(torch.int32) & 0xFFFF).any()


def test_one_byte_represents_0_and_1():
    assert one_byte(torch.tensor([0.0, FAINTEST, 1.0])).tolist() == [0, 1, 1 + STEPS]


def test_every_chart_is_saved_as_a_picture(folder):
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


def test_the_charts_of_a_comparison_are_pictures(folder, tmp_path):
    write_comparison_pictures(headsink.compare(folder, f"{folder}@64"), tmp_path)
    assert (tmp_path / "figure-change-sink-64.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figure-change-output-64.svg").read_text()


def test_every_chart_is_embedded_at_its_size(page):
    specs = json.loads(re.search(r"const SPECS = (.*);</script>", page)[1])
    boxes = re.findall(
        r'<figure class="chart" id="([^"]*)".*?style="--w: (.*?)px; --h: (.*?)px">(<svg.*?</svg>)</figure>', page
    )
    assert sorted(name for name, *_ in boxes) == sorted({re.sub("^map-.*", "map", name) for name in specs})
    assert len(boxes) == page.count('class="chart"')
    for name, width, height, svg in boxes:
        root = ElementTree.fromstring(svg)
        assert {element.tag.split("}")[1] for element in root.iter()} <= SHAPES
        room = (float(width), float(height))
        taken = (float(root.get("width")), float(root.get("height")))
        assert room == taken or (name == "map" and room[0] >= taken[0] and room[1] >= taken[1])
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names))


def test_flat_attention_is_the_mean_of_the_rows_that_count():
    for length, sliding in ((1, None), (2, None), (37, None), (37, 8), (37, 100)):
        rows = torch.ones(length, length).tril().triu(1 - (sliding or length)).double()
        rows /= rows.sum(-1, keepdim=True)
        first = min(max(1, length // 4), length - 1)
        torch.testing.assert_close(flat_keys(length, sliding), rows[first:].mean(0))
        within = [rows.triu(1 - distance)[first:].sum(-1).mean() for distance in distances(length)]
        torch.testing.assert_close(flat_profile(length, sliding), torch.stack(within))


NAMES = [
    "line\u2028end",
    "paragraph\u2029end",
    "null\0",
    "escape\x1b[31m",
    "\ufffe\uffff",
    "half \ud83d",
    "\\ \" ' ` ${1}",
]


def test_every_character_of_a_name_is_drawn_or_escaped(tmp_path):
    rows = [{"a": a, "b": b, "share": 0.5} for a in NAMES for b in NAMES]
    sort = charts.alt.X("a:N", sort=NAMES)
    chart = charts.alt.Chart(charts.alt.Data(values=rows)).mark_rect().encode(x=sort, y="b:N")
    write_picture(tmp_path / "figure", charts.fill(charts.spec(chart, NAMES), more=rows))
    svg = (tmp_path / "figure.svg").read_text()
    for escaped in (
        "line\\u2028end",
        "paragraph\\u2029end",
        "null\\x00",
        "escape\\x1b[31m",
        "\\ufffe\\uffff",
        "half \\ud83d",
    ):
        assert svg.count(f">{escaped}<") == 3  # on both axes, and in the title
    write_picture(tmp_path / "bare", chart.to_dict(validate=False))
    assert "null\\x00" in (tmp_path / "bare.svg").read_text()


def test_names_in_a_picture_are_unique():
    gradient = charts.alt.Chart(charts.alt.Data(values=[{"v": 1, "t": 'url(#clip) id="x"'}])).mark_point()
    spec = charts.spec(gradient.encode(color="v:Q", x="t:N"))
    one, other = (
        re.findall(r'id="([^"]*\d)"|url\(#([^()]*\d)\)', draw(name, spec)["svg"]) for name in ("one", "other")
    )
    assert {name.split("-")[0] for pair in one for name in pair if name} == {"one"}
    assert {name.split("-")[0] for pair in other for name in pair if name} == {"other"}
    assert 'url(#clip) id="x"' in draw("one", spec)["svg"]


def test_a_missing_share_is_a_dash():
    assert [share(0.5), share(None)] == ["50%", "–"]


# In a browser


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
    """Return the viewport coordinates of a head on the map."""
    return page.run(
        "const cell = document.querySelectorAll('#map .layer_0_marks path')[arguments[0]];"
        "cell.scrollIntoView({block: 'center'});"
        "const box = cell.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]",
        layer * HEADS + head,
    )


@needs_browser
def test_it_opens_quickly_without_an_error(chromium, folder, capsys):
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
    for _ in range(70):
        report.press("tab")
        reached.append(report.run("return document.activeElement.id"))
    assert {"length", "domain", "statistic", "layer", "head", "map-focus", "role", "filter", "shaded", "tokens"} <= set(
        reached
    )


def saved(page, folder, selector, *names):
    """Focus buttons of the page and press Enter; return the files that this saves."""
    page.save_to(folder)
    for n in range(len(names)):
        page.run("document.querySelectorAll(arguments[0])[arguments[1]].focus()", selector, n)
        page.press("enter")
    files = [folder / name for name in names]
    end = time.monotonic() + PATIENCE
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, sorted(path.name for path in folder.iterdir())
        time.sleep(0.02)
    return files


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


@needs_browser
def test_a_figure_is_saved_as_it_is_shown(report, census, tmp_path):
    """By keyboard, as a file that needs no style sheet."""
    choose(report, "length", 64)
    choose(report, "statistic", "first")
    names = "figure-first-64.svg", "figure-first-64.png"
    svg, png = saved(report, tmp_path, "[data-of=map]", *names)
    root = ElementTree.fromstring(svg.read_text())
    cells = [one for one in root.iter() if "mark-rect" in one.get("class", "")]
    fills = [path.get("fill") for group in cells for path in group if path.get("fill", "").startswith("rgb")]
    shown = report.run(
        "return [...document.querySelectorAll('#map .mark-rect path')].map(path => path.getAttribute('fill'))"
        ".filter(fill => fill?.startsWith('rgb'))"
    )
    assert fills == shown
    assert len(fills) >= 12
    assert all(text.get("font-family") for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "url(file:" not in svg.read_text()
    width, height = (float(root.get(side)) for side in ("width", "height"))
    assert png_size(png) == pytest.approx((3 * width, 3 * height), abs=3)


@needs_browser
def test_every_figure_has_buttons_that_save_it(chromium, folder, comparison, tmp_path):
    for path in (folder / "report.html", comparison):
        chromium.open(f"file://{path}")
        figures = chromium.run("return [...document.querySelectorAll('figure')].map(figure => figure.id)")
        buttons = chromium.run(
            "return [...document.querySelectorAll('[data-save=svg]')].map(button => button.dataset.of)"
        )
        assert figures == buttons
        chromium.run("saved = []; saveFile = (content, name) => saved.push([content.size, name])")
        chromium.run("document.querySelectorAll('[data-save]').forEach(button => button.click())")
        chromium.wait(f"return saved.length === {2 * len(figures)}")
        found = chromium.run("return saved")
        assert min(size for size, _ in found) > 1000
        assert len({name for _, name in found}) == 2 * len(figures)
        assert chromium.console() == []


@needs_browser
def test_menus_change_the_view(report, census):
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
    on_the_map(census.required_window(200, "prose"))
    colours = "return new Set([...document.querySelectorAll('#map .layer_0_marks path')].map(p => p.getAttribute('fill'))).size"
    assert report.run(colours) == len(census.required_window(200, "prose").unique())
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
def test_the_top_keys_are_as_many_as_the_view_has(report):
    shown = "return [...document.getElementById('keys').tBodies[0].rows].filter(row => !row.hidden).length"
    choose(report, "length", 64)
    choose(report, "domain", 3)
    assert report.run(shown) == 8  # of one text
    report.run("const {rows} = document.getElementById('keys').tBodies[0]; while (rows.length > 1) rows[1].remove()")
    choose(report, "domain", 0)
    assert report.run(shown) == 10


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


# Before and after the scripts


WHERE = """return Object.fromEntries([...document.querySelectorAll('section, h2, h3, table, .chart')].map((one, n) => {
  const box = one.getBoundingClientRect();
  return [`${n} ${one.tagName} ${one.id}`, [box.top + scrollY, box.height]];
}).concat([["page", [document.documentElement.scrollHeight, document.documentElement.scrollWidth]]]))"""
SAID = """
const names = ['counts', 'map-title', 'head-title', 'head-role', 'scores', 'keys', 'text-head'].concat(
  ['tokens', 'every', 'every-said', 'errors-title']);
const every = (selector, of) => [...document.querySelectorAll(selector)].map(of);
return {
  said: names.map(id => document.getElementById(id).textContent.replace(/\\s+/g, ' ').trim()),
  shades: every('#tokens span', one => one.className.replace(/ (kept|evicted)/, '')),
  bars: every('.bar i, .bar b', one => Math.round(10 * parseFloat(one.style.width || one.style.left))),
  chosen: every('tr.shown', one => one.dataset.name),
  menus: every('select, #controls input', one => one.value),
};
"""


@pytest.fixture(scope="module")
def still(folder):
    """The report without its scripts."""
    path = folder / "still.html"
    page = (folder / "report.html").read_text()
    path.write_text(re.sub("<script.*?</script>", "", page, flags=re.DOTALL))
    return f"file://{path}"


@needs_browser
@pytest.mark.parametrize("width", [1400, 900, 500])
def test_the_layout_is_stable_when_scripts_draw(chromium, folder, still, width):
    chromium.resize(width, 1100)
    try:
        chromium.load(still)
        before = chromium.run(WHERE)
        chromium.open(f"file://{folder}/report.html")
        after = chromium.run(WHERE)
    finally:
        chromium.resize(1400, 1100)
    assert before.keys() == after.keys()
    moved = {name: (place, after[name]) for name, place in before.items() if place != pytest.approx(after[name], abs=2)}
    assert moved == {}
    assert after["page"][1] <= width


@needs_browser
def test_without_scripts_the_page_shows_the_same(chromium, folder, still):
    chromium.load(still)
    before = chromium.run(SAID)
    drawn = "return [...document.querySelectorAll('.chart svg')].map(one => one.getBoundingClientRect().height)"
    assert min(chromium.run(drawn)) > 50
    chromium.open(f"file://{folder}/report.html")
    assert chromium.run(SAID) == before


@needs_browser
def test_a_link_into_the_page_lands_on_its_section(chromium, folder, comparison):
    chromium.resize(1400, 500)
    try:
        links = (folder / "report.html", ["by-layer", "stability"]), (comparison, ["roles"])
        for path, name in ((path, name) for path, names in links for name in names):
            chromium.open(f"file://{path}#{name}")
            there = chromium.run("return scrollY")
            assert there > 0
            chromium.run("document.getElementById(arguments[0]).scrollIntoView()", name)
            assert chromium.run("return scrollY") == pytest.approx(there, abs=2), name
    finally:
        chromium.resize(1400, 1100)


@needs_browser
def test_the_map_of_a_comparison_stays_where_it_is(chromium, comparison):
    page, still = comparison.read_text(), comparison.with_name("still.html")
    still.write_text(re.sub("<script.*?</script>", "", page, flags=re.DOTALL))
    chromium.load(f"file://{still}")
    box = "const box = document.getElementById('map').getBoundingClientRect(); return [box.x, box.y, box.width, box.height]"
    before = chromium.run(box)
    chromium.open(f"file://{comparison}")
    assert chromium.run(box) == pytest.approx(before, abs=2)


@needs_browser
def test_python_and_the_page_format_numbers_alike(chromium, folder):
    chromium.open(f"file://{folder}/report.html")
    random = torch.Generator().manual_seed(0)
    numbers = (10 ** (14 * torch.rand(500, generator=random, dtype=torch.float64) - 8)).tolist()
    numbers += [0.0, 1.125, 2.375, 12.25, 0.0625, 999.5, 1000.5, 1234.5, 99.95, 1e-6, 9.996e-7, 1.2345e-300]
    numbers += [-number for number in numbers if number]
    for digits in (2, 3):
        written = chromium.run("return arguments[0].map(value => figures(value, arguments[1]))", numbers, digits)
        assert [short(number, digits) for number in numbers] == written
    assert [short(None), short(float("nan")), short(float("inf"))] == ["–"] * 3


@needs_browser
def test_a_page_is_drawn_whatever_its_names_are(chromium, census, tmp_path):
    settings = json.loads(json.dumps(census.settings))
    for text in settings["texts"]:
        text["domain"] = {"prose": NAMES[0], KIND: NAMES[1], "short": NAMES[-1]}[text["domain"]]
    settings["model"]["name"] = NAMES[3]
    write_page(headsink.Census(settings, census.vocabulary, census.arrays), tmp_path / "report.html")
    chromium.open(f"file://{tmp_path}/report.html")
    assert chromium.console() == []
    labels = chromium.run("return [...document.querySelectorAll('#same-roles text')].map(label => label.textContent)")
    assert {"line\\u2028end", "paragraph\\u2029end"} < set(labels)
