"""Attention maps on pages: what they hold, and their use by mouse, keyboard and on a phone."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from browser import _call, needs_browser
from families import tiny
from plans import random_plan
from small_census import Letters
from test_report import png_size, saved, unpack

import headsink
from headsink.census.attention_maps import Request, pooled_attention
from headsink.census.views import token_views
from headsink.errors import HeadsinkError
from headsink.report.attention import TOP, standing_out
from headsink.report.page import write_report
from headsink.runtime.kept import kept_tokens
from headsink.utils.pack import FAINTEST, STEPS

pytestmark = pytest.mark.slow

TEXT = "".join(chr(40 + 7 * n % 61) for n in range(400))
HEADS = [(0, 1), (2, 3)]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def plan(model):
    return random_plan(model, 1)


@pytest.fixture(scope="module")
def census(model):
    texts = {"prose": [TEXT[:220]], "code": [TEXT[100:320]], "short": [TEXT[7:80]]}
    return headsink.analyze(model, Letters(), texts=texts, lengths=(64, 200), progress=False)


@pytest.fixture(scope="module")
def folder(census, model, plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "census"
    return write_report(census, path, model=model, plan=plan, maps=HEADS)


@pytest.fixture(scope="module")
def maps(model, plan):
    return headsink.attention_maps(model, Letters(), TEXT, HEADS, plan=plan)


def attention_of(shades):
    return np.where(shades > 0, FAINTEST ** (1 - (shades.astype(float) - 1) / STEPS), 0)


def close(packed, exact):
    np.testing.assert_allclose(attention_of(packed), exact, rtol=0.04, atol=2e-6)


def test_the_report_holds_the_maps_of_its_texts(census, model, plan, folder):
    page = (folder / "report.html").read_text()
    assert len(page) < 5_000_000
    for n, (text, (length, _)) in enumerate(token_views(census).items()):
        header, arrays = unpack(page, f"text-{text}")
        ids = census.arrays[f"{text}.ids"][:length].tolist()
        every = [(layer, head) for layer in range(3) for head in range(4)]
        coarse, fine = pooled_attention(model, ids, Request(every, 64, 0), Request(HEADS, 64, TOP))
        assert header["coarse"] == coarse.tile
        close(arrays["coarse"], coarse.tiles)
        np.testing.assert_array_equal(arrays["kept"], kept_tokens(model, plan, ids))
        assert header["heads"] == ([] if n > 1 else [list(head) for head in HEADS])
        if n < 2:
            close(arrays["detailed.tiles"], fine.tiles)
            close(arrays["detailed.weights"], fine.weights)
            np.testing.assert_array_equal(arrays["detailed.keys"], fine.keys.clamp(min=0))


def test_maps_of_any_text_are_a_small_page(maps, model, plan):
    ids = Letters()(TEXT)["input_ids"]
    header, arrays = unpack(maps.html(), "data")
    (found,) = pooled_attention(model, ids, Request(HEADS, 128, TOP))
    close(arrays["tiles"], found.tiles)
    close(arrays["mean"], found.mean)
    assert "".join(header["words"]) == TEXT
    assert repr(maps) == "AttentionMaps of LlamaForCausalLM: heads 0.1, 2.3, 400 tokens"
    assert maps.model == "LlamaForCausalLM"  # which was not loaded, and has no name
    kept = kept_tokens(model, plan, ids)
    np.testing.assert_array_equal(arrays["kept"], torch.stack([kept[0, 0], kept[2, 1]]))
    (one,) = unpack(maps[2, 3].html(), "data")[0]["heads"]
    assert one == [2, 3]
    assert maps._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(HeadsinkError, match=r"heads: no map of \(1, 1\)"):
        maps[1, 1]


def test_maps_are_saved_without_replacing_files_of_others(maps, tmp_path):
    path = maps.save(tmp_path / "maps.html")
    assert maps.save(path) == path
    path.write_text("years of work")
    with pytest.raises(HeadsinkError, match="headsink did not write"):
        maps.save(path)


def test_maps_are_saved_as_pictures(maps, tmp_path):
    """With every tile where it belongs, darker for more attention; saved again over what headsink wrote alone."""
    one = maps[2, 3]
    svg, png = one.save(tmp_path / "map.svg"), one.save(tmp_path / "map.PNG")
    tiles, tile = one.attention.tiles[0], one.attention.tile
    root = ElementTree.fromstring(svg.read_text())
    group = next(one for one in root.iter() if "mark-rect" in one.get("class", ""))
    fills = [sum(map(int, re.findall(r"\d+", path.get("fill")))) for path in group]
    places = [tuple(map(float, re.match(r"M([\d.]+),([\d.]+)", path.get("d")).groups())) for path in group]
    rows, columns = torch.tril_indices(*tiles.shape)
    values = tiles[rows, columns].clamp(0.001, 1)
    assert len(fills) == len(values)
    order = values.argsort()
    assert np.all(np.diff(np.array(fills)[order]) <= 2)
    side = 330 / len(tiles)
    np.testing.assert_allclose(places, torch.stack([columns, rows], 1) * side, atol=0.01)
    assert f"tiles of {tile} × {tile}" in svg.read_text()
    assert "Layer 2, head 3" in svg.read_text()
    width, height = (float(root.get(name)) for name in ("width", "height"))
    assert png_size(png) == pytest.approx((3 * width, 3 * height), abs=3)
    for path in (svg, png):
        assert one.save(path) == path
        path.write_bytes(path.read_bytes().replace(b"headsink", b"inkscape"))
        with pytest.raises(HeadsinkError, match="headsink did not write"):
            one.save(path)
        one.save(path, force=True)
    assert maps.save(tmp_path / "both.svg").read_text().count("mark-rect") >= 2


def test_a_long_text_stays_a_small_page():
    model = tiny("llama", layers=1)
    model.config.max_position_embeddings = 8192
    page = headsink.attention_maps(model, Letters(), TEXT * 20, [(0, 0), (0, 2)]).html()
    assert len(page) < 1_500_000


def test_markup_in_a_text_of_a_map_is_not_markup(model):
    class Markup(Letters):
        def decode(self, ids):
            return "<img src=x onerror=alert(1)></script>"

    page = headsink.attention_maps(model, Markup(), TEXT[:50], HEADS).html()
    assert "<img" not in page
    assert "onerror" not in page


def test_a_census_and_its_heads_show_themselves(census, model):
    shape = "3 layers of 4 query heads and 2 KV heads, 3 texts (prose, code, short) at 64, 200 tokens"
    assert repr(census) == f"Census of LlamaForCausalLM: {shape}"
    assert repr(census.head(2, 1)) == f"Layer 2, head 1 of: {census!r}"
    assert repr(headsink.compare(census, census)).endswith(
        ": 0 of 84 roles changed"
    )  # 12 heads, 7 lengths and kinds of text
    with pytest.raises(HeadsinkError, match="score: 'snk' is unknown; one of first, sink"):
        census.score("snk", 200)
    with pytest.raises(
        HeadsinkError, match="at length 200 on short; it has lengths 64, 200 and texts prose, code, short"
    ):
        census.score("sink", 200, "short")
    page = census.head(2, 1).html()
    assert f"{float(census.score('sink', 200)[2, 1]):.3g}" in page
    assert "layer 2, head 1 (KV head 0)" in page
    assert census._repr_html_().count("srcdoc") == 1
    assert "<script" not in page + census._repr_html_()
    for layer, head in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(HeadsinkError, match="head: there is no layer"):
            census.head(layer, head)


def test_the_heads_that_stand_out_have_every_role_there_is(census):
    roles = census.roles(200)
    assert {roles[layer][head] for layer, head in standing_out(census)} == {role for row in roles for role in row}


def test_wrong_options_are_one_line(census, model, plan, tmp_path):
    for options, message in (
        ({"plan": plan}, "plan: it is marked in the texts of the attention maps"),
        ({"plan": plan, "model": model, "maps": "none"}, "plan: it is marked"),
        ({"model": tiny("llama", seed=1)}, "model: the census was made with another model"),
        ({"model": model, "maps": [(9, 0)]}, r"heads: 9\.0 is not a head"),
        ({"model": model, "maps": [(0, 0)] * 13}, "maps: 13 heads given, and a report holds 12"),
    ):
        with pytest.raises(HeadsinkError, match=message):
            write_report(census, tmp_path / "a", **options)
    with pytest.raises(HeadsinkError, match="heads: none given"):
        headsink.attention_maps(model, Letters(), TEXT, [])
    assert not (tmp_path / "a").exists()


# In a browser


@pytest.fixture
def report(chromium, folder):
    chromium.open(f"file://{folder}/report.html#?layer=2&head=3")
    yield chromium
    assert chromium.console() == []


def said(page, name, pane=0):
    return page.run("return panes[arguments[0]].box.querySelector(arguments[1]).textContent", pane, name)


def settle(page):
    page.run("return new Promise(done => setTimeout(done, 50))")


def on_the_map(page, query, key, length=200):
    """The point of the viewport of a query and a key."""
    return page.run(
        "const canvas = document.querySelector('canvas'); canvas.scrollIntoView({block: 'center'});"
        "const box = canvas.getBoundingClientRect(), at = n => (n + 0.5) / arguments[2] * box.width;"
        "return [box.x + at(arguments[1]), box.y + at(arguments[0])]",
        query,
        key,
        length,
    )


@needs_browser
def test_a_click_on_the_map_shows_what_the_query_attends_to(report, census, model):
    ids = census.arrays["0.ids"][:200].tolist()
    (found,) = pooled_attention(model, ids, Request([(2, 3)], 64, TOP))
    report.click(*on_the_map(report, 150, 20))
    report.wait("return state.query === 150")
    assert " 150 attends to" in said(report, ".list-title")
    listed = report.run("return [...document.querySelectorAll('.map-keys li b')].map(b => Number(b.textContent))")
    np.testing.assert_allclose(listed, found.weights[0, 150, : len(listed)], rtol=0.05)
    shaded = report.run(
        "return [...document.querySelectorAll('#tokens span')]"
        ".map((span, n) => span.classList.contains('s0') ? -1 : n).filter(n => n >= 0)"
    )
    assert set(shaded) <= set(found.keys[0, 150].tolist())
    assert "query=150" in report.run("return location.hash")
    report.click(*on_the_map(report, 150, 20))
    report.wait("return state.query === null")


@needs_browser
def test_the_keyboard_moves_zooms_and_chooses(report):
    report.run("document.querySelector('canvas').focus()")
    for key in ("+", "+"):
        report.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))", key)
    assert report.run("return panes[0].map.span") == 50
    before = report.run("return panes[0].map.above")
    report.press("down", "right")
    cursor = report.run("return panes[0].map.cursor")
    assert before <= cursor["query"] < before + 50
    assert f"query {cursor['query']} " in said(report, ".map-said")
    report.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))")
    report.wait(f"return state.query === {cursor['query']}")
    report.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: '0'}))")
    assert report.run("return panes[0].map.span") == 200
    assert report.run("return panes[0].map.left") == 0


@needs_browser
def test_the_canvas_shows_the_attention_of_its_cells(report, census, model):
    """A pixel's colour is that of the attention that the map says there is."""
    (found,) = pooled_attention(model, census.arrays["0.ids"][:200].tolist(), Request([(2, 3)], 64, TOP))
    query, keys = 180, found.keys[0, 180, :3].tolist()
    pixels, colours, there = report.run(
        "const [query, keys] = arguments, {map} = panes[0];"
        "const per = map.canvas.width / map.span, at = n => Math.floor((n + .5) * per);"
        "const {data} = map.canvas.getContext('2d').getImageData(0, at(query), map.canvas.width, 1);"
        "const bytes = keys.map((key, n) => map.shown.weights[query * map.shown.top + n]);"
        "return [keys.map(key => [...data.slice(4 * at(key), 4 * at(key) + 3)]), bytes.map(byte => palette()[byte]),"
        " keys.map(key => map.attention(query, key))]",
        query,
        keys,
    )
    for pixel, colour, attention, weight in zip(
        pixels, colours, there, found.weights[0, query, :3].tolist(), strict=True
    ):
        assert pixel == [colour & 255, colour >> 8 & 255, colour >> 16 & 255]
        assert attention == {"value": pytest.approx(weight, rel=0.04), "exact": True}
    assert report.run("return panes[0].map.attention(10, 11)") == {"value": 0, "exact": True}


@needs_browser
def test_a_map_is_saved_at_a_whole_number_of_pixels_for_a_token(report, census, model, tmp_path):
    """Of the part that is shown; token by token if the head was read so, otherwise by tiles."""
    (png,) = saved(report, tmp_path, "[data-do=save]", "figure-attention-2.3-prose-0.png")
    assert png_size(png) == (1200, 1200)
    (found,) = pooled_attention(model, census.arrays["0.ids"][:200].tolist(), Request([(2, 3)], 64, TOP))
    query, key = 180, int(found.keys[0, 180, 0])
    read = (
        "const [query, key] = arguments, {map} = panes[0], canvas = map.picture(), n = 6;"
        "const {data} = canvas.getContext('2d').getImageData(n * key, n * query, n, n);"
        "const colours = new Set(new Uint32Array(data.buffer)), {shown} = map;"
        "const top = Array.from({length: shown.top}, (_, t) => query * shown.top + t).find(t => shown.keys[t] === key);"
        "return [[...colours], palette(false)[shown.weights[top]]]"
    )
    colours, colour = report.run(read, query, key)
    assert colours == [colour]
    report.run("panes[0].map.zoom(0.25, {query: 100, key: 50})")
    part = report.run("const {map} = panes[0]; return [map.picture().width, map.span]")
    assert part[1] == 50
    assert part[0] % 24 == 0 or part[0] % 23 == 0  # 50 or 51 tokens of 23 or 24 pixels
    report.run("choose({layer: 0, head: 0})")
    report.wait("return panes[0].shown.top === 0")
    tile = report.run("return panes[0].shown.tile")
    report.run("panes[0].map.act('whole')")
    tiles = -(-200 // tile)
    assert report.run("return panes[0].map.picture().width") == tiles * round(1200 / tiles)


@needs_browser
def test_two_fingers_zoom_the_map(report):
    x, y = on_the_map(report, 150, 100)
    report.pinch(((x - 20, y), (x - 60, y)), ((x + 20, y), (x + 60, y)))
    span, left, above = report.run("const {map} = panes[0]; return [map.span, map.left, map.above]")
    assert span == pytest.approx(200 / 3, rel=0.1)
    assert left + span / 2 == pytest.approx(100, abs=8)
    assert above < 150 < above + span
    assert report.run("return [state.query, panes[0].map.fingers.size]") == [None, 0]


@needs_browser
def test_kept_and_evicted_tokens_are_marked(report, census, model, plan):
    kept = kept_tokens(model, plan, census.arrays["0.ids"][:200].tolist())[2, 1]
    for name, flags in (("kept", kept), ("evicted", ~kept)):
        marked = f"return [...document.querySelectorAll('#tokens span')].map(s => s.classList.contains('{name}'))"
        assert report.run(marked) == flags.tolist()
    assert f"Kept: {int(kept.sum())} of 200 tokens (KV head 1)." in said(report, ".kept-said")


@needs_browser
def test_two_texts_stand_side_by_side(report, census):
    report.run("document.getElementById('beside').click()")
    report.wait("return panes.length === 2 && panes[1].shown?.text === 1")
    assert report.run("return state.text2") == 1
    words = "return [...panes[1].box.querySelectorAll('.tokens span')].map(s => s.textContent).join('')"
    assert report.run(words) == "".join(census.vocabulary[i] for i in census.arrays["1.ids"][:200].tolist())
    report.run("panes[1].text.onQuery(90)")
    report.wait("return state.query2 === 90 && state.query === null")
    assert " 90 attends to" in said(report, ".list-title", 1)
    ids = report.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    report.run("document.getElementById('beside').click()")
    report.wait("return panes[1].box.hidden")


@needs_browser
def test_the_back_button_returns_to_the_head_before(report):
    report.run('document.querySelector(\'#every tbody button[data-layer="1"][data-head="2"]\').click()')
    report.wait("return document.getElementById('head-title').textContent.startsWith('Layer 1, head 2 ')")
    report.run("history.back()")
    report.wait("return document.getElementById('head-title').textContent.startsWith('Layer 2, head 3 ')")
    report.run("history.forward()")
    report.wait("return document.getElementById('head-title').textContent.startsWith('Layer 1, head 2 ')")


@needs_browser
def test_heads_are_sorted_and_filtered_by_any_score(report, census):
    heads = (
        "return [...document.querySelectorAll('#every tbody button')]"
        ".map(button => [Number(button.dataset.layer), Number(button.dataset.head)])"
    )
    change = (
        "const set = (id, value, kind) => {"
        "  const input = document.getElementById(id); input.value = value; input.dispatchEvent(new Event(kind)); };"
    )
    local = census.score("local", 200)
    report.run("document.querySelector('#every thead button[data-by=local]').click()")
    values = [float(local[layer, head]) for layer, head in report.run(heads)]
    assert len(values) == 12
    assert values == pytest.approx(sorted(values, reverse=True), rel=2e-3)
    report.run("document.querySelector('#every thead button[data-by=local]').click()")
    values = [float(local[layer, head]) for layer, head in report.run(heads)]
    assert values == pytest.approx(sorted(values), rel=2e-3)
    middle = float(local.median())
    report.run(
        change + "set('filter', 'local', 'change'); set('least', arguments[0], 'input')",
        middle,
    )
    shown = [local[layer, head] for layer, head in report.run(heads)]
    assert 0 < len(shown) < 12
    assert all(value > 0.99 * middle for value in shown)
    role = census.roles(200)[0][0]
    report.run(
        change + "set('least', '', 'input'); set('role', arguments[0], 'input')",
        role,
    )
    assert all(census.roles(200)[layer][head] == role for layer, head in report.run(heads))
    assert report.run("return [...document.getElementById('filter').options].length") > 12


@needs_browser
def test_a_page_of_maps_works_alone_and_in_a_frame(chromium, maps, tmp_path):
    path = maps.save(tmp_path / "maps.html")
    chromium.open(f"file://{path}")
    assert chromium.run("return document.querySelectorAll('.tokens span').length") == 400
    chromium.run(
        "const menu = document.getElementById('head'); menu.value = 1; menu.dispatchEvent(new Event('change'))"
    )
    chromium.run("document.querySelectorAll('.tokens span')[300].click()")
    assert " 300 attends to" in chromium.run("return document.querySelector('.list-title').textContent")
    assert "KV head 1" in chromium.run("return document.querySelector('.kept-said').textContent")
    assert chromium.console() == []
    frame = tmp_path / "notebook.html"
    frame.write_text(f"<html><body>{maps._repr_html_()}</body></html>")
    chromium.load(f"file://{frame}")
    settle(chromium)
    assert chromium.console() == []


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1300])
def test_the_page_fits_every_width_in_both_themes(chromium, folder, width, theme):
    def emulate(command, **parameters):
        _call("POST", f"{chromium.session}/goog/cdp/execute", cmd=f"Emulation.{command}", params=parameters)

    emulate("setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    try:
        chromium.open(f"file://{folder}/report.html")
        assert chromium.run("return document.documentElement.scrollWidth") == width
        wide = (
            "return ['scores', 'every'].map(id => document.getElementById(id).parentElement)"
            ".map(box => box.scrollWidth - box.clientWidth)"
        )
        assert max(chromium.run(wide)) <= 1
        ground, ink = chromium.run("const of = getComputedStyle(document.body); return [of.backgroundColor, of.color]")
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ground, ink)]
        assert abs(light[0] - light[1]) > 0.6
        assert (light[0] > light[1]) == (theme == "light")
        labels = chromium.run("return getComputedStyle(document.querySelector('#profile .role-axis-label text')).fill")
        assert labels == (ink if theme == "dark" else labels)
        upper = (
            "const canvas = document.querySelector('canvas'), context = canvas.getContext('2d');"
            "return [...context.getImageData(canvas.width - 3, 2, 1, 1).data].slice(0, 3)"
        )
        assert (sum(chromium.run(upper)) / 765 > 0.5) == (theme == "light")
        assert chromium.console() == []
    finally:
        emulate("clearDeviceMetricsOverride")
        emulate("setEmulatedMedia", features=[])
