"""The whole way on the built-in model."""

import pytest
import torch

import headsink
from headsink import corpus, probes
from headsink.census.floating import floating_tokens, suggested_tau
from headsink.census.statistics import windows
from headsink.generation import generate

TOKENS = 2000


@pytest.fixture(scope="module")
def half_plan(smollm2):
    model, tokenizer = smollm2
    return headsink.calibrate(model, tokenizer, budget=0.5, context=TOKENS, quality_contexts=(), progress=False)


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_a_passkey_is_found_with_the_model_and_with_the_half_plan(smollm2, half_plan, depth):
    model, tokenizer = smollm2
    probe = probes.probe("number", tokenizer, TOKENS, depth=depth, seed=5, split="heldout")
    prompt, answer = probe.ids[: -probe.answer_tokens], probe.ids[-probe.answer_tokens :]
    results = [generate(model, tokenizer, prompt, plan, max_new_tokens=len(answer)) for plan in (None, half_plan)]
    assert [result.ids for result in results] == [answer, answer]
    assert results[1].kv_bytes < 0.6 * results[0].kv_bytes


def test_the_plan_keeps_its_budget(half_plan):
    assert 0.4 < half_plan.kept(TOKENS) <= 0.5


def test_the_plan_finds_floating_sinks(half_plan):
    assert any(head.floating for layer in half_plan.layers for head in layer)


def test_census_sees_the_first_token_and_the_floating_sinks(smollm2):
    """Facts measured before on this model: no sinks in layers 0 and 1, sinks from layer 12, floating ones in layers 3 to 10."""
    model, tokenizer = smollm2
    census = headsink.analyze(model, tokenizer, lengths=(1024,), domains=("prose",), progress=False)
    first, sink = census.score("first", 1024), census.score("sink", 1024)
    assert float(first[:2].max()) < 0.3
    assert float(first[12:].mean()) > 0.25
    assert float(sink[3:11].mean()) > float(first[3:11].mean()) + 0.1
    errors = census.score("errors", 1024)[..., windows(1024).index(128)]  # [layers, heads, kept]
    first_only, floating_too = errors[3:11].mean((0, 1)).tolist()
    assert first_only > 2 * floating_too
    assert suggested_tau(census, 1024) == 0.4
    assert any(row["token"] == " the" for row in floating_tokens(census, 1024, most=3))


def test_all_full_plan_gives_the_models_tokens(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([corpus.tokens("prose", tokenizer, 300, split="heldout")])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with headsink.apply(model, headsink.Plan.full(model)):
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)
