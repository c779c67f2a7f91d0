"""The tokens that a plan keeps, as they are read out of its cache, are those of the rule."""

import pytest
import torch
from families import tiny
from plans import random_plan, window_plan

import headsink
from headsink import Pattern, Plan
from headsink.errors import HeadsinkError
from headsink.eviction.scorers import LINEAR
from headsink.models.spec import describe
from headsink.runtime.kept import kept_tokens

IDS = torch.randint(3, 211, (90,), generator=torch.Generator().manual_seed(0)).tolist()


def plan_of(model, patterns):
    shape = describe(model)
    weights = torch.ones(shape.layers, shape.kv_heads, LINEAR.n_features(shape.head_dim))
    return Plan.of(model, patterns, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_and_initial_tokens_are_kept(dtype):
    model = tiny("llama", dtype=dtype)
    patterns = [[Pattern(3, 0, 10), Pattern()], [Pattern(0, 0, 7), Pattern(2, 0, 0)], [Pattern(1, 0, 300)] * 2]
    kept = kept_tokens(model, plan_of(model, patterns), IDS)
    assert kept.shape == (3, 2, 90)
    for layer, own in enumerate(patterns):
        for head, pattern in enumerate(own):
            place = torch.arange(90)
            expected = (place < pattern.sink) | (place >= 90 - (90 if pattern.window is None else pattern.window))
            assert torch.equal(kept[layer, head], expected), (layer, head)


@pytest.mark.parametrize("family", ["llama", "llama-mha", "gemma3", "mistral-sliding", "gpt-oss"])
@pytest.mark.parametrize("seed", range(2))
def test_as_many_tokens_are_kept_as_the_pattern_says(family, seed):
    model = tiny(family)
    plan, shape = random_plan(model, seed), describe(model)
    kept = kept_tokens(model, plan, IDS)
    for layer, own in enumerate(kept):
        for head, flags in enumerate(own):
            if shape.windows[layer] is not None:
                assert torch.equal(flags.nonzero()[:, 0], torch.arange(90 - 11, 90))
                continue
            pattern = plan.layers[layer][head].pattern
            evicts = pattern.size(90) < 90
            synthetic = pattern.top_k > 1 and evicts  # the last of the top-k keys
            assert int(flags.sum()) == pattern.size(90) - synthetic, pattern
            assert flags[: pattern.sink].all()
            assert flags[90 - min(pattern.window or 0, 90) :].all()


def test_the_top_keys_are_those_of_the_cache():
    """The keys of the tokens that are kept are in the cache, and no other token's."""
    model = tiny("llama")
    plan = plan_of(model, [[Pattern(2, 6, 8)] * 2] * 3)
    kept = kept_tokens(model, plan, IDS)
    cache = headsink.new_cache(model, plan)
    full = headsink.new_cache(model, Plan.full(model))
    for own, own_plan in ((cache, plan), (full, Plan.full(model))):
        with torch.no_grad(), headsink.apply(model, own_plan):
            model(torch.tensor([IDS]), past_key_values=own)
    for layer in range(3):
        (group,), (everything,) = cache.layers[layer].groups, full.layers[layer].groups
        for head in range(2):
            away = (everything.keys[0, head, :90, None] - group.keys[0, head]).norm(dim=-1)
            near = away.min(1).values < 1e-3
            assert torch.equal(near, kept[layer, head])


def test_plans_with_cache_relative_positions_are_read_as_they_are_served():
    model = tiny("llama")
    plan = window_plan(model, 3)
    kept = kept_tokens(model, plan, IDS)
    for layer, heads in enumerate(plan.layers):
        for head, own in enumerate(heads):
            assert int(kept[layer, head].sum()) == own.pattern.size(90)


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(HeadsinkError):
        kept_tokens(tiny("llama"), Plan.full(tiny("qwen3")), IDS)
