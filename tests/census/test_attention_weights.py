"""Attention matrices for other tools equal those of transformers' eager attention."""

import pytest
import torch
from architectures import make
from families import FAMILIES, tiny
from small_census import OPTIONS, Letters

import headsink
from headsink import HeadsinkError
from headsink.census.head_statistics import SCORES

TEXT = "A text for a picture, and some more of it."


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_eager_attention(family):
    model = tiny(family)
    found = headsink.attention_weights(model, Letters(), TEXT)
    assert found.tokens == list(TEXT)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([Letters()(TEXT)["input_ids"]])
        expected = torch.cat(model(ids, output_attentions=True).attentions)
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-5)
    assert torch.equal(found.layer(2), found.weights[2])


def test_some_layers_of_a_model_with_other_layers():
    found = headsink.attention_weights(make("LFM2"), Letters(), TEXT, layers=[3])
    assert found.layers == [3]
    assert repr(found) == f"AttentionWeights: 1 layers, 4 query heads, {len(TEXT)} tokens"
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(found.weights.shape[:3]))
    with pytest.raises(HeadsinkError, match="layers: 0 given; the layers with attention are 1, 3"):
        headsink.attention_weights(make("LFM2"), Letters(), TEXT, layers=[0])
    with pytest.raises(HeadsinkError, match="layer: 1 is not there; one of 3"):
        found.layer(1)


@pytest.mark.parametrize("text", ["", "x" * 513])
def test_a_text_of_the_wrong_length_is_refused(text):
    with pytest.raises(HeadsinkError, match=f"text: it has {len(text)} tokens; give 1 to 512"):
        headsink.attention_weights(tiny("llama"), Letters(), text)


def test_the_strongest_heads_of_a_census():
    census = headsink.analyze(tiny("llama"), Letters(), **OPTIONS)
    assert set(SCORES) >= {"sink", "far"}
    score = census.score("sink", 100)
    found = census.strongest("sink", 12)
    assert sorted(found) == [(layer, head) for layer in range(3) for head in range(4)]
    values = [float(score[place]) for place in found]
    assert values == sorted(values, reverse=True)
    assert (
        census.strongest("far", 2, 16, "prose")
        == sorted(found, key=lambda place: -float(census.score("far", 16, "prose")[place]))[:2]
    )
    census.settings["model"]["numbers"] = [1, 3, 5]  # of the layers with attention
    assert {layer for layer, _ in census.strongest("sink", 12)} == {1, 3, 5}
    with pytest.raises(HeadsinkError, match="strongest: 13 heads were asked for; the census has 12"):
        census.strongest("sink", 13)
    with pytest.raises(HeadsinkError, match="score: 'sinks' is unknown; one of first, sink"):
        census.strongest("sinks", 1)
