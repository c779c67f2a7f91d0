"""The pages of a hybrid number layers as the model does: of its four layers, 1 and 3 have attention."""

import numpy as np
import pytest
from architectures import make
from browser import needs_browser
from small_census import Letters
from test_report import unpack

import headsink
from headsink import Census
from headsink.census.views import STATISTICS
from headsink.report.comparison import write_comparison
from headsink.report.page import write_report

pytestmark = pytest.mark.slow

TEXT = "".join(chr(40 + 7 * n % 61) for n in range(90))


@pytest.fixture(scope="module")
def model():
    return make("LFM2")


@pytest.fixture(scope="module")
def census(model):
    return headsink.analyze(model, Letters(), texts=[TEXT], lengths=(32, 80), progress=False)


@pytest.fixture(scope="module")
def folder(census, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "census"
    return write_report(census, path, model=model, maps=[(3, 2)])


def test_the_page_names_the_layers_and_offers_no_others(census, folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "The layers of the model that have attention are 1, 3." in page
    assert 'href="#?layer=3&amp;head=2"' in page
    menu = page.split('<select id="layer">')[1].split("</select>")[0]
    assert menu.replace(" selected", "") == "<option>1</option><option>3</option>"
    header, arrays = unpack(page, "data")
    assert (header["layers"], header["heads"]) == ([1, 3], [4, 2])
    assert arrays["80.0.value"].shape == (len(STATISTICS), 2, 4)
    assert unpack(page, "text-0")[0]["heads"] == [[3, 2]]
    assert "a sink in layer 1 is a sink later" in page
    assert '<th scope="col">layer 1</th>' in page
    assert "layer 0" not in page
    assert "layer 2" not in page


@needs_browser
def test_the_map_the_menu_and_the_arrow_keys_move_between_them(chromium, census, folder):
    chromium.open(f"file://{folder}/report.html#?layer=3&head=2")
    assert chromium.run("return document.getElementById('head-title').textContent") == "Layer 3, head 2 (KV head 1)"
    shown = chromium.run("return drawn.map.view.data('heads').map(row => [row.layer, row.head, row.sink])")
    expected = [
        [layer, head, float(census.score("sink", 80)[row, head])]
        for row, layer in enumerate(census.layers)
        for head in range(4)
    ]
    np.testing.assert_allclose(shown, expected, rtol=1e-3)
    errors = chromium.run("return drawn.window.view.data('errors').filter(row => row.chosen).map(row => row.error)")
    np.testing.assert_allclose(errors, census.score("errors", 80)[1, 2].flatten().clamp(min=1e-6), rtol=1e-3, atol=1e-6)
    assert chromium.run("return panes[0].shown.top") > 0  # the head that was read token by token
    assert chromium.run("return drawn.pairs?.view.data('pairs').every(row => row.a === 1 && row.b === 3)")
    chromium.run("document.getElementById('map-focus').focus()")
    chromium.press("up")
    chromium.wait("return document.getElementById('head-title').textContent.startsWith('Layer 1, head 2 ')")
    chromium.press("up")
    assert chromium.run("return [state.layer, document.getElementById('layer').value]") == [1, "1"]
    chromium.run(
        "const menu = document.getElementById('layer'); menu.value = 3; menu.dispatchEvent(new Event('change'))"
    )
    chromium.wait("return document.getElementById('head-title').textContent.startsWith('Layer 3, head 2 ')")
    chromium.open(f"file://{folder}/report.html#?layer=2&head=2")  # which has no attention
    assert chromium.run("return state.layer") in (1, 3)
    assert chromium.console() == []


@needs_browser
def test_a_comparison_shows_the_head_of_that_layer(chromium, census, tmp_path):
    other = Census(census.settings, census.vocabulary, {name: array.clone() for name, array in census.arrays.items()})
    other.arrays["0.80.scores"][1, 2] += 0.5
    write_comparison(headsink.compare(census, other), tmp_path / "comparison.html")
    chromium.open(f"file://{tmp_path}/comparison.html")
    assert chromium.run("return document.getElementById('head-title').textContent") == "Layer 3, head 2"
    assert chromium.run("return value(viewOf('sink'), 'change')") == pytest.approx(0.5, abs=1e-3)
    chromium.run("document.getElementById('map-focus').focus()")
    chromium.press("up")
    chromium.wait("return document.getElementById('head-title').textContent === 'Layer 1, head 2'")
    assert chromium.run("return value(viewOf('sink'), 'change')") == 0
    assert chromium.console() == []
