"""Prefill compression: continuations equal the reference, and the cache has the size it reports."""

import pytest
import torch
from families import EAGER, FAMILIES, tiny
from feeding import TOLERANCE, padded
from plans import random_plan
from reference import reference_logits
from transformers import DynamicCache, StaticCache

import headsink
from headsink import HeadsinkError, Plan
from headsink.cache.cache import nbytes
from headsink.models.transformers_names import cache_argument


def compressed(model, plan, ids, mask=None):
    """Return the compressed cache of a context read in full attention, and the bytes before compression."""
    cache, options = DynamicCache(config=model.config), {}
    if mask is not None:
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        model(ids, **cache_argument(cache), **options)
    before = nbytes(cache)
    return headsink.compress(model, plan, cache, mask), before, cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[20], [1], [7, 1, 5]], ids=str)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_continuations_equal_the_reference(family, sizes, padding, case_seed):
    # In float64 transformers' eager attention of Gemma 2 makes NaN of padding.
    model = tiny(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    context = (30, 45)[case_seed % 2] if padding else (1, 30, 45)[case_seed % 3]  # at 1 a row would be padding only
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    plan = random_plan(model, case_seed)
    expected = reference_logits(model, plan, ids, mask, freeze=context, prefill_compression=True)
    cache, _, _ = compressed(model, plan, ids[:, :context], None if mask is None else mask[:, :context])
    start, left = context, list(sizes)
    with headsink.apply(model, plan), torch.no_grad():
        while start < ids.shape[1]:
            end = min(start + (left.pop(0) if len(left) > 1 else left[0]), ids.shape[1])
            options = {}
            if mask is not None:
                position_ids = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
                options = {"attention_mask": mask[:, :end], "position_ids": position_ids}
            logits = model(ids[:, start:end], **cache_argument(cache), **options).logits
            torch.testing.assert_close(logits, expected[:, start:end], **TOLERANCE)
            start = end


@pytest.mark.parametrize("family", FAMILIES)
def test_an_all_full_plan_equals_the_model(family):
    """Bit for bit, where `sdpa` can express its attention."""
    model, ids = tiny(family), torch.randint(3, 211, (1, 60))
    plain = DynamicCache(config=model.config)
    cache, _, _ = compressed(model, Plan.full(model), ids[:, :40])
    with torch.no_grad():
        model(ids[:, :40], **cache_argument(plain))
        for start, end in ((40, 41), (41, 60)):
            expected = model(ids[:, start:end], **cache_argument(plain)).logits
            with headsink.apply(model, Plan.full(model)):
                found = model(ids[:, start:end], **cache_argument(cache)).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if family in EAGER else 0)


def test_memory_is_freed():
    model = tiny("llama")
    plan = Plan.uniform(model, headsink.Pattern(4, 0, 16))
    cache, before, full = compressed(model, plan, torch.randint(3, 211, (1, 400)))
    assert nbytes(full) == 0
    assert cache.nbytes() < before * 0.07  # 20 of 400 keys, and bookkeeping
    assert cache.get_seq_length() == 400


def test_incompressible_caches_are_refused():
    model = tiny("llama")
    with pytest.raises(HeadsinkError, match="StaticCache cannot be compressed"):
        headsink.compress(model, Plan.full(model), StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(HeadsinkError, match="this cache is empty"):
        headsink.compress(model, Plan.full(model), DynamicCache(config=model.config))
    _, _, read = compressed(model, Plan.full(model), torch.randint(3, 211, (1, 9)))
    with pytest.raises(HeadsinkError, match="this cache is empty"):  # compression empties it
        headsink.compress(model, Plan.full(model), read)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_of_another_model_or_without_its_sliding_layers_is_refused(family):
    model, cache = tiny(family), DynamicCache()
    with torch.no_grad():
        model(torch.randint(3, 211, (1, 9)), **cache_argument(cache))
    with pytest.raises(HeadsinkError, match="for other weights"):
        headsink.compress(tiny(family, 1), Plan.full(model), cache)
    if family == "gemma3":
        with pytest.raises(HeadsinkError, match="this model has sliding-window layers: make the cache"):
            headsink.compress(model, Plan.full(model), cache)


def test_a_mask_that_does_not_fit_the_cache_is_refused():
    model, whole = tiny("llama"), torch.ones(2, 9, dtype=torch.int64)
    right, left = whole.clone(), whole.clone()
    right[0, -2:], left[0, :2] = 0, 0
    for mask, said in (
        (right, "it pads on the right; pad on the left"),
        (left[:, 1:], r"its shape is \[2, 8\] and must be \[2, 9\]"),
        (whole[:, 1:], r"its shape is \[2, 8\] and must be \[2, 9\]"),
        (left[:1], r"its shape is \[1, 9\] and must be \[2, 9\]"),
    ):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.randint(3, 211, (2, 9)), **cache_argument(cache))
        with pytest.raises(HeadsinkError, match=said):
            headsink.compress(model, Plan.full(model), cache, mask)
        assert cache.get_seq_length() == 9  # it is unchanged
    once = Plan.full(model).model_copy(update={"prefill_compression": True, "reconstruction_prompt": (7, 8)})
    with pytest.raises(
        HeadsinkError, match=r"input_ids: \[1, 9\]; this plan reconstructs the context, the \[2, 9\] tokens"
    ):
        headsink.compress(model, once, cache, input_ids=whole[:1])
