"""Keys and values in 8 bits: rounding, and a model under a plan against the reference with rounded keys."""

import copy

import pytest
import torch
from families import tiny
from feeding import TOLERANCE, WAYS, feed, padded, split
from plans import random_plan
from reference import reference_logits
from transformers import LlamaConfig, LlamaForCausalLM

import headsink
from headsink import HeadsinkError, Plan
from headsink.attention.int8 import dequantize, quantize
from headsink.decoding.step import open_decoder
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument

FAMILIES = ["llama", "llama-mha", "qwen3", "gemma2", "gemma3", "gpt-oss"]
OPTIONS = {"exact": False, "kv_dtype": "int8"}


def test_rounding():
    numbers = torch.randn(3, 5, 64) * 10.0 ** torch.randint(-20, 20, (3, 5, 1))
    numbers[0, 0] = 0
    rows = quantize(numbers)
    assert (rows.dtype, rows.shape) == (torch.int8, (3, 5, 68))
    found, most = dequantize(rows, torch.float32), numbers.abs().amax(-1, keepdim=True)
    assert ((found - numbers).abs() <= most / 254 * 1.0001).all()
    assert (found[0, 0] == 0).all()
    torch.testing.assert_close(found.abs().amax(-1, keepdim=True), most)
    assert torch.equal(quantize(found)[..., :-4], rows[..., :-4])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_any_plan_equals_the_reference(family, way, padding, case_seed):
    model = tiny(family, dtype=torch.float64)
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    real = slice(None) if mask is None else mask.bool()
    for plan in (random_plan(model, case_seed), Plan.full(model)):
        expected = reference_logits(model, plan, ids, mask, split(61, WAYS[way]), int8=True)
        logits, _ = feed(model, plan, ids, WAYS[way], mask, **OPTIONS)
        torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)
        exact = reference_logits(model, plan, ids, mask, split(61, WAYS[way]))
        assert way == "one pass" or not torch.allclose(logits[real], exact[real], **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
@pytest.mark.parametrize("freeze", [30, 45])
def test_frozen_plans_and_sparse_prefill(family, freeze, case_seed):
    model, ids = tiny(family, dtype=torch.float64), torch.randint(3, 211, (2, 61))
    plan = random_plan(model, case_seed)
    calls = split(61, [20, 1], freeze)
    logits, _ = feed(model, plan, ids, [20, 1], freeze=freeze, **OPTIONS)
    torch.testing.assert_close(logits, reference_logits(model, plan, ids, None, calls, freeze, int8=True), **TOLERANCE)
    sparse, _ = feed(model, plan, ids, [20, 7, 1], prefill="sparse", **OPTIONS)
    torch.testing.assert_close(sparse, reference_logits(model, plan, ids, None, [1] * 61, int8=True), **TOLERANCE)


def close(found, expected):
    """A key whose numbers lie next to the middle of two may be rounded otherwise, which later tokens see."""
    error = (found.double() - expected).abs().amax(-1)
    assert error.median() < 1e-5
    assert error.max() < 3e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[40, 1], [1], [35, 3, 2, 1]], ids=["prompt", "token by token", "few at once"])
def test_kernels(family, sizes, case_seed):
    """float64 runs in torch, float32 in compiled kernels."""
    model, exact, (ids, mask) = tiny(family), tiny(family, dtype=torch.float64), padded()
    for plan in (random_plan(model, case_seed), Plan.full(model)):
        expected, _ = feed(exact, plan, ids, sizes, mask, **OPTIONS)
        close(feed(model, plan, ids, sizes, mask, **OPTIONS)[0][mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_step(family, dtype, case_seed):
    model, ids = tiny(family, dtype=dtype), torch.randint(3, 211, (2, 90))
    for plan in (random_plan(model, case_seed), Plan.full(model)):
        _, cache = feed(model, plan, ids[:, :50], [50], **OPTIONS)
        other, parts = copy.deepcopy(cache), []
        with headsink.apply(model, plan), open_decoder(model, cache) as step:
            parts = [step.run(ids[:, n]) for n in range(50, 90)]
        with headsink.apply(model, plan, compiled=False), torch.no_grad():
            expected = [model(ids[:, n : n + 1], **cache_argument(other)).logits[:, 0] for n in range(50, 90)]
        error = (torch.stack(parts) - torch.stack(expected).float()).abs()
        assert error.median() < (1e-5 if dtype == torch.float32 else 2e-2)
        assert cache.nbytes() == other.nbytes()
        for mine, theirs in zip(cache.layers, other.layers, strict=True):
            for own, group in zip(mine.groups, theirs.groups, strict=True):
                assert own.keys.dtype == torch.int8
                assert own.keys.shape == group.keys.shape


def test_memory():
    model, ids = tiny("llama", dtype=torch.bfloat16), torch.randint(3, 211, (2, 61))
    shape = describe(model)
    plan = Plan.full(model)
    caches = [headsink.compress(model, plan, ids, kv_dtype=kind) for kind in ("auto", "int8")]
    keys = [sum(group.keys.nbytes for layer in cache.layers for group in layer.groups) for cache in caches]
    assert keys[1] / keys[0] == (shape.head_dim + 4) / (2 * shape.head_dim)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prefixes(tmp_path, family, case_seed):
    model, ids = tiny(family), torch.randint(3, 211, (1, 70))
    plan = random_plan(model, case_seed)
    for reconstruct in (False, True):
        cache = headsink.compress(model, plan, ids[:, :60], reconstruct=reconstruct, kv_dtype="int8")
        path = headsink.save_prefix(tmp_path / f"{reconstruct}", cache, ids[:, :60])
        loaded, seen = headsink.load_prefix(path, model)
        assert loaded.kv_dtype == "int8"
        assert torch.equal(seen, ids[:, :60])
        assert loaded.nbytes() <= cache.nbytes()
        with headsink.apply(model, plan, compiled=False), torch.no_grad():
            found, expected = (model(ids[:, 60:], **cache_argument(own)).logits for own in (loaded, cache))
        assert torch.equal(found, expected)


def test_generation_crops_and_beams(case_seed):
    """Assisted decoding takes tokens back; beams reorder rows; lossless mode drafts in 8 bits."""
    model, assistant, ids = tiny("llama"), tiny("llama", seed=1), torch.randint(3, 211, (1, 60))
    plan, same = random_plan(model, case_seed), {"max_new_tokens": 20, "do_sample": False}
    with headsink.apply(model, plan, **OPTIONS):
        plain = model.generate(ids, **same)
        assisted = model.generate(ids, assistant_model=assistant, **same)
        beams = model.generate(ids, num_beams=3, **same)
    assert torch.equal(plain, assisted)
    assert beams.shape[0] == 1
    assert torch.equal(beams[:, :60], ids)
    found = headsink.generate_lossless(model, plan, ids, kv_dtype="int8", **same)
    assert torch.equal(found, model.generate(ids, **same))


def test_refusals():
    model, ids = tiny("llama"), torch.randint(3, 211, (1, 20))
    plan = Plan.full(model)
    with (
        pytest.raises(HeadsinkError, match="kv_dtype: 'int4' is neither 'auto'"),
        headsink.apply(model, plan, kv_dtype="int4"),
    ):
        pass
    with (
        pytest.raises(HeadsinkError, match="kv_dtype: 'int8' has no gradients"),
        headsink.apply(model, plan, **OPTIONS),
    ):
        model(ids)
    shape = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    narrow = LlamaForCausalLM(LlamaConfig(**shape, head_dim=6, num_hidden_layers=1))
    with pytest.raises(HeadsinkError, match="head sizes that are multiples of 4, and the model has 6"):
        headsink.new_cache(narrow, Plan.full(narrow), kv_dtype="int8")
