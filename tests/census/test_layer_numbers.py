"""A layer has one number, that of the model, in the census, its exports, maps, ablation and plans: also in a hybrid.

The hybrid has four layers, of which 1 and 3 have attention.
"""

import io
import json

import pytest
import torch
from architectures import make
from rich.console import Console
from small_census import Letters

import headsink
from headsink import Census, HeadsinkError, Pattern, Plan
from headsink.census.head_statistics import first_row
from headsink.cli.ablate import strongest_heads
from headsink.cli.analyze_output import census_json, print_census
from headsink.evaluation.head_sets import Heads
from headsink.models.spec import describe
from headsink.report.attention import standing_out
from headsink.runtime.kept import kept_tokens
from headsink.utils.format import ranges

LAYERS, LENGTH = [1, 3], 64
TEXT = "".join(chr(40 + 7 * n % 61) for n in range(LENGTH))
EVERY = {(layer, head) for layer in LAYERS for head in range(4)}


@pytest.fixture(scope="module")
def model():
    return make("LFM2")


@pytest.fixture(scope="module")
def census(model):
    return headsink.analyze(model, Letters(), texts=[TEXT], lengths=(32, LENGTH), progress=False)


def test_every_part_names_the_layers_that_have_attention(model, census):
    plan = Plan.uniform(model, Pattern(2, 0, 8))
    assert census.layers == LAYERS
    assert [layer for layer, heads in enumerate(plan.layers) if heads is not None] == LAYERS
    assert headsink.attention_weights(model, Letters(), TEXT).layers == LAYERS
    assert set(Heads(describe(model), kv_heads=False).read("1.*,3.*")) == EVERY
    assert set(census.strongest("sink", 8)) == EVERY
    table = census.table.to_pydict()
    assert set(zip(table["layer"], table["head"], strict=True)) == EVERY
    assert set(headsink.attention_maps(model, Letters(), TEXT, sorted(EVERY)).attention.heads) == EVERY
    assert set(standing_out(census)) <= EVERY
    assert repr(census.head(3, 2)) == f"Layer 3, head 2 of: {census!r}"


def test_a_number_means_the_same_layer_everywhere(model, census):
    """Attention to the first token, and of the last query, from whole matrices."""
    maps, rows = headsink.attention_maps(model, Letters(), TEXT, sorted(EVERY)), census.table.to_pylist()
    for layer, head in sorted(EVERY):
        exact = headsink.attention_weights(model, Letters(), TEXT, layers=[layer]).layer(layer)[head]
        first = float(exact[first_row(LENGTH) :, 0].mean())
        (row,) = (row for row in rows if (row["length"], row["layer"], row["head"]) == (LENGTH, layer, head))
        assert row["first"] == pytest.approx(first, rel=1e-4)
        torch.testing.assert_close(maps[layer, head].attention.weights[0, -1], exact[-1].topk(16).values)
        assert f"layer {layer}, head {head} (KV head {head // 2})" in census.head(layer, head).html()
    score = census.score("first", LENGTH)
    layer, head = census.strongest("first", 1)[0]
    assert score[LAYERS.index(layer), head] == score.max()


def test_the_tokens_that_a_plan_keeps_are_those_of_the_layer(model):
    """Of two layers with different windows."""
    plan = Plan.of(model, [None, [Pattern(0, 0, 5)] * 2, None, [Pattern(0, 0, 11)] * 2])
    maps = headsink.attention_maps(model, Letters(), TEXT, [(3, 0), (1, 3)], plan=plan)
    assert maps.kept.sum(1).tolist() == [11, 5]
    assert kept_tokens(model, plan, Letters()(TEXT)["input_ids"]).sum(2).tolist() == [[5, 5], [11, 11]]


def test_the_tables_of_the_terminal_and_the_json_have_these_numbers(census):
    shown = io.StringIO()
    print_census(Console(file=shown, width=200), census)
    assert "in layer 1" in shown.getvalue()
    assert "layer 3 head" in shown.getvalue()
    assert "layer 0" not in shown.getvalue()
    assert "layer 2" not in shown.getvalue()
    assert census_json(census)["layers"] == LAYERS


def test_a_layer_without_attention_is_refused_by_its_number(model, census):
    for call, message in (
        (
            lambda: census.head(0, 0),
            "head: there is no layer 0, head 0; the census has layers 1, 3 of query heads 0 to 3",
        ),
        (
            lambda: headsink.attention_maps(model, Letters(), TEXT, [(2, 0)]),
            r"heads: 2\.0 is not a head of .*, which has attention in layers 1, 3, with query heads 0 to 3",
        ),
        (lambda: Heads(describe(model), kv_heads=False).read("0.0"), "heads: layer 0 has no attention"),
        (
            lambda: headsink.attention_weights(model, Letters(), TEXT, layers=[2]),
            "layers: 2 given; the layers with attention are 1, 3",
        ),
    ):
        with pytest.raises(HeadsinkError, match=message):
            call()


@pytest.mark.parametrize(
    ("numbers", "text"), [(range(30), "0 to 29"), ([1, 3], "1, 3"), ([0, 1, 3, 4, 5, 9], "0, 1, 3 to 5, 9"), ([7], "7")]
)
def test_layers_in_a_message_are_ranges(numbers, text):
    assert ranges(numbers) == text


def test_a_folder_keeps_the_numbers(model, census, tmp_path):
    census.save(tmp_path / "a")
    assert Census.load(tmp_path / "a").layers == LAYERS
    assert strongest_heads(tmp_path / "a", model, "sink", 3) == census.strongest("sink", 3)
    with pytest.raises(HeadsinkError, match="is of another model"):
        strongest_heads(tmp_path / "a", make("Llama"), "sink", 3)


def test_a_folder_without_numbers_has_attention_in_every_layer(census, tmp_path):
    """As headsink wrote it before it had a census of hybrids."""
    census.save(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "census.json").read_text())
    del settings["model"]["numbers"]
    (tmp_path / "a" / "census.json").write_text(json.dumps(settings))
    assert Census.load(tmp_path / "a").layers == [0, 1]


def test_compared_heads_have_these_numbers(census):
    other = Census(census.settings, census.vocabulary, {name: array.clone() for name, array in census.arrays.items()})
    other.arrays[f"0.{LENGTH}.scores"][1, 2] += 0.5
    found = headsink.compare(census, other).to_dict()
    sink = next(view for view in found["scores"] if view["score"] == "sink" and view["lengths"] == [LENGTH] * 2)
    assert sink["largest_at"] == [3, 2]
    assert (sink["most_moved"][0]["layer"], sink["most_moved"][0]["head"]) == (3, 2)
    assert {row["layer"] for row in found["changed"]} <= {3}
    elsewhere = census.settings | {"model": census.settings["model"] | {"numbers": [0, 2]}}
    with pytest.raises(HeadsinkError, match=r"the layers with attention are 1, 3 in Lfm2.* and 0, 2 in Lfm2"):
        headsink.compare(census, Census(elsewhere, census.vocabulary, census.arrays))
