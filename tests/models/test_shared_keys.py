"""Layers that attend to the keys of another layer (Gemma 3n, Gemma 4 E) see what that layer keeps."""

import pytest
import torch
import transformers
from architectures import close, generated, in_calls, make, tokens
from plans import random_plan
from reference import reference_logits

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument

TOKENS = 48  # of `in_calls`
SHARED = ("Gemma 3n", "Gemma 4 E")
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
needs_new = pytest.mark.skipif(OLD, reason="needs transformers 5.24")


@pytest.mark.skipif(not OLD, reason="refused before transformers 5.24 only")
@pytest.mark.parametrize("name", SHARED)
def test_they_are_refused_with_an_old_transformers(name):
    with pytest.raises(HeadsinkError, match=r"attend to the keys of other layers; this needs transformers 5\.24$"):
        describe(make(name))


@needs_new
@pytest.mark.parametrize("name", SHARED)
def test_a_layer_knows_whose_keys_it_attends_to(name):
    shape = describe(make(name))
    assert shape.keys_of == (0, 1, 0, 1)
    assert shape.shared == (True, True, False, False)
    assert shape.attending == (0, 1, 2, 3)


@needs_new
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("chunk", [7, 16, 47])
def test_segments_of_dense_prefill_equal_the_reference(name, chunk):
    model = make(name)
    plan = random_plan(model, 1)
    ends = [*range(chunk, TOKENS - 5, chunk), TOKENS - 5]
    segments = [end - begin for begin, end in zip([0, *ends], ends, strict=False)] + [1] * 5
    expected = reference_logits(model, plan, tokens(TOKENS), segments=segments)
    with headsink.apply(model, plan):
        cache = headsink.new_cache(model, plan, chunk_size=chunk)
        close(in_calls(model, cache, [TOKENS - 5] + [1] * 5), expected)


@needs_new
@pytest.mark.parametrize("name", SHARED)
def test_a_later_turn_equals_the_reference(name):
    model = make(name)
    plan, calls = random_plan(model, 2), [20, 1, 1, 15, 11]
    expected = reference_logits(model, plan, tokens(TOKENS), segments=calls)
    with headsink.apply(model, plan):
        close(in_calls(model, headsink.new_cache(model, plan), calls), expected)


@needs_new
@pytest.mark.parametrize("name", SHARED)
def test_only_the_layers_that_compute_keys_hold_them(name):
    model, plan = make(name), Plan.uniform(make(name), Pattern(2, 0, 8))
    long = tokens(200)
    with headsink.apply(model, plan), torch.no_grad():
        cache = headsink.new_cache(model, plan)
        model(long, **cache_argument(cache), use_cache=True)
    held = [
        sum(group.keys.shape[2] for group in layer.groups) if hasattr(layer, "groups") else 0 for layer in cache.layers
    ]
    assert 11 <= held[0] < 200
    assert 10 <= held[1] < 200
    assert held[2:] == [0, 0]


@needs_new
@pytest.mark.parametrize("name", SHARED)
def test_all_but_the_last_queries_may_be_left_out(name):
    """transformers gives the later layers of Gemma 4 the last token of a prompt only."""
    model = make(name)
    plan = random_plan(model, 3)
    with headsink.apply(model, plan), torch.no_grad():
        whole = model(tokens(TOKENS)).logits[:, -1:]
        close(model(tokens(TOKENS), logits_to_keep=1).logits, whole)


@needs_new
@pytest.mark.parametrize("name", SHARED)
def test_assisted_decoding_generates_what_the_model_generates(name):
    model = make(name)
    ids = tokens(TOKENS)
    with headsink.apply(model, Plan.full(model)):
        found = generated(model, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(found, generated(model, ids))
