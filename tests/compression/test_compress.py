"""compress: the cache of a document equals the reference, has the size that it reports, and goes on evicting."""

import pytest
import torch
from families import EAGER, FAMILIES, tiny
from feeding import TOLERANCE, padded, split
from plans import random_plan
from reference import reference_logits
from transformers import DynamicCache

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.cache.cache import nbytes
from headsink.eviction.scorers import LINEAR
from headsink.models.transformers_names import cache_argument


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[20], [1], [7, 1, 5]], ids=str)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_continuations_equal_the_reference(family, sizes, padding, case_seed):
    # In float64 transformers' eager attention of Gemma 2 makes NaN of padding.
    model = tiny(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    context = (30, 45)[case_seed % 2] if padding else (1, 30, 45)[case_seed % 3]  # at 1 a row would be padding only
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    plan = random_plan(model, case_seed)
    segments = [context, *split(61 - context, sizes)]
    expected = reference_logits(model, plan, ids, mask, segments)
    given = None if mask is None else mask[:, :context]
    cache, start = headsink.compress(model, plan, ids[:, :context], attention_mask=given), context
    assert not cache.frozen
    with headsink.apply(model, plan), torch.no_grad():
        for size in segments[1:]:
            end, options = start + size, {}
            if mask is not None:
                position_ids = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
                options = {"attention_mask": mask[:, :end], "position_ids": position_ids}
            logits = model(ids[:, start:end], **cache_argument(cache), **options).logits
            torch.testing.assert_close(logits, expected[:, start:end], **TOLERANCE)
            start = end


@pytest.mark.parametrize("family", FAMILIES)
def test_an_all_full_plan_equals_the_model(family):
    """Up to rounding, because the cache is for the fastest kernels."""
    model, ids = tiny(family), torch.randint(3, 211, (1, 60))
    plain = DynamicCache(config=model.config)
    cache = headsink.compress(model, Plan.full(model), ids[:, :40])
    with torch.no_grad():
        model(ids[:, :40], **cache_argument(plain))
        for start, end in ((40, 41), (41, 60)):
            expected = model(ids[:, start:end], **cache_argument(plain)).logits
            with headsink.apply(model, Plan.full(model)):
                found = model(ids[:, start:end], **cache_argument(cache)).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if family in EAGER else 5e-6)


def test_a_plan_with_cache_relative_positions_reads_sparsely():
    model, ids = tiny("llama"), torch.randint(3, 211, (1, 60))
    plan = Plan.uniform(model, Pattern(2, 0, 9), positions="cache-relative")
    with headsink.apply(model, plan), torch.no_grad():
        expected = model(ids).logits[:, 59:]
        cache = headsink.compress(model, plan, ids[:, :59])
        found = model(ids[:, 59:], **cache_argument(cache)).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_memory_is_that_of_the_plan():
    model = tiny("llama")
    plan, ids = Plan.uniform(model, Pattern(4, 0, 16)), torch.randint(3, 211, (1, 400))
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_argument(full))
    cache = headsink.compress(model, plan, ids)
    assert cache.nbytes() < nbytes(full) * 0.07  # 20 of 400 keys, and bookkeeping
    assert cache.get_seq_length() == 400
    before = cache.nbytes()
    with headsink.apply(model, plan), torch.no_grad():
        model(ids[:, :100], **cache_argument(cache))
    assert cache.nbytes() == before


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_at_most_one_layer_is_full_while_reading(padding, monkeypatch):
    """Every layer has evicted when the next one begins."""
    from headsink.cache.layer import PlanLayer

    model, ids = tiny("llama"), torch.randint(3, 211, (2, 400))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    weights = torch.randn(3, 2, LINEAR.n_features(12))
    plan = Plan.of(model, [[Pattern(4, 9, 16), Pattern(0, 0, 40)]] * 3, weights)
    attend, sizes = PlanLayer.attend, []

    def measured(layer, *arguments):
        output = attend(layer, *arguments)
        sizes.append(sum(t.untyped_storage().nbytes() for g in layer.groups for t in (g.keys, g.values)))
        return output

    monkeypatch.setattr(PlanLayer, "attend", measured)
    headsink.compress(model, plan, ids, attention_mask=mask if padding else None)
    assert sizes == [2 * (29 + 40) * 2 * 12 * 4] * 3  # rows, keys of both heads, keys and values, head size, bytes


def test_a_right_padded_mask_or_one_of_another_shape_is_refused():
    model, whole = tiny("llama"), torch.ones(2, 9, dtype=torch.int64)
    right, left, gaps = whole.clone(), whole.clone(), whole.clone()
    right[0, -2:], left[0, :2], gaps[0, 3:5] = 0, 0, 0
    for mask, said in (
        (right, "it pads on the right; pad on the left"),
        (left[:, 1:], r"its shape is \[2, 8\] and must be \[2, 9\]"),
        (whole[:, 1:], r"its shape is \[2, 8\] and must be \[2, 9\]"),
        (left[:1], r"its shape is \[1, 9\] and must be \[2, 9\]"),
        (gaps, "attention_mask has gaps"),
    ):
        with pytest.raises(HeadsinkError, match=said) as refused:
            headsink.compress(model, Plan.full(model), torch.randint(3, 211, (2, 9)), attention_mask=mask)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_other_inputs_are_refused(reconstruct):
    model = tiny("llama")
    longest = model.config.max_position_embeddings
    for ids, said in (
        (torch.zeros(1, 0, dtype=torch.int64), r"input_ids: \[1, 0\] given; compress takes \[batch, tokens\]"),
        (torch.ones(9, dtype=torch.int64), r"input_ids: \[9\] given; compress takes \[batch, tokens\]"),
        (
            torch.ones(1, longest + 1, dtype=torch.int64),
            f"a text has {longest + 1} tokens, over the model's maximum of {longest}",
        ),
    ):
        with pytest.raises(HeadsinkError, match=said) as refused:
            headsink.compress(model, Plan.full(model), ids, reconstruct=reconstruct)
        assert "\n" not in str(refused.value)
    with pytest.raises(HeadsinkError, match="for other weights") as refused:
        headsink.compress(tiny("llama", 1), Plan.full(model), torch.ones(1, 9, dtype=torch.int64))
    assert "\n" not in str(refused.value)
