"""Caches in 8 bits, with values in 4 bits too: rounding, and a model under a plan against the reference with rounded keys."""

import copy
from typing import get_args

import pytest
import torch
from families import tiny
from feeding import TOLERANCE, WAYS, feed, padded, split
from plans import random_plan
from reference import reference_logits

import headsink
from headsink import HeadsinkError, Plan
from headsink.attention.formats import FORMATS, INT4, INT8, KVDtype, stored
from headsink.decoding.step import open_decoder
from headsink.models.transformers_names import cache_argument
from headsink.runtime.options import KV_DTYPES as NAMES

FAMILIES = ["llama", "llama-mha", "qwen3", "gemma2", "gemma3", "gpt-oss"]
DIMS = {"int8": None, "k8v4": 32}  # head sizes, None: the family's own
KV_DTYPES = pytest.mark.parametrize("kv_dtype", DIMS)


def options(kv_dtype):
    return {"exact": False, "kv_dtype": kv_dtype}


def neighbours(number):
    """The bfloat16 next to a number, from the highest to the lowest, as float32."""
    near = number.bfloat16()
    ends = torch.tensor([float("inf"), float("-inf")], dtype=torch.bfloat16)
    above, below = (torch.nextafter(near, end) for end in ends)
    return [above.float(), near.float(), below.float()]


def rounded_to_4_bits(numbers):
    """By definition, number by number."""
    found = torch.empty_like(numbers)
    for row, out in zip(numbers.view(-1, 32), found.view(-1, 32), strict=True):
        zero = next(z for z in neighbours(row.min()) if z <= row.min())
        scale = next(s for s in reversed(neighbours((row.max() - zero) / 15)) if s >= (row.max() - zero) / 15)
        for n, number in enumerate(row):
            out[n] = zero + scale * (round(float((number - zero) / scale)) if scale > 0 else 0)
    return found


def test_rounding_to_8_bits():
    numbers = torch.randn(3, 5, 64) * 10.0 ** torch.randint(-20, 20, (3, 5, 1))
    numbers[0, 0] = 0
    rows = INT8.quantize(numbers)
    assert (rows.dtype, rows.shape) == (torch.int8, (3, 5, 68))
    found, most = INT8.dequantize(rows, torch.float32), numbers.abs().amax(-1, keepdim=True)
    assert ((found - numbers).abs() <= most / 254 * 1.0001).all()
    assert (found[0, 0] == 0).all()
    torch.testing.assert_close(found.abs().amax(-1, keepdim=True), most)
    assert torch.equal(INT8.quantize(found)[..., :-4], rows[..., :-4])


def test_rounding_to_4_bits():
    numbers = torch.randn(9, 64) * 10.0 ** torch.randint(-6, 6, (9, 1))
    numbers[0], numbers[1] = 0, 3.5
    numbers[2:5] += torch.tensor([[1.0], [-100.0], [-0.003]])
    rows = INT4.quantize(numbers)
    assert (rows.dtype, rows.shape) == (torch.uint8, (9, 40))
    found, expected = INT4.dequantize(rows, torch.float32), rounded_to_4_bits(numbers)
    step = (numbers.unflatten(1, (-1, 32)).amax(-1) - numbers.unflatten(1, (-1, 32)).amin(-1)) / 14
    error = (found - expected).abs().unflatten(1, (-1, 32)).amax(-1)
    assert (error <= step).all()  # where a number lies between two steps
    assert error.median() < 1e-6 * step.median()
    assert torch.equal(found[:2], numbers[:2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@KV_DTYPES
def test_any_plan_equals_the_reference(family, way, padding, kv_dtype, case_seed):
    model = tiny(family, dtype=torch.float64, head_dim=DIMS[kv_dtype])
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    real = slice(None) if mask is None else mask.bool()
    for plan in (random_plan(model, case_seed), Plan.full(model)):
        expected = reference_logits(model, plan, ids, mask, split(61, WAYS[way]), kv_dtype=kv_dtype)
        logits, _ = feed(model, plan, ids, WAYS[way], mask, **options(kv_dtype))
        torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)
        exact = reference_logits(model, plan, ids, mask, split(61, WAYS[way]))
        assert way == "one pass" or not torch.allclose(logits[real], exact[real], **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
@pytest.mark.parametrize("freeze", [30, 45])
@KV_DTYPES
def test_frozen_plans_and_sparse_prefill(family, freeze, kv_dtype, case_seed):
    model, ids = tiny(family, dtype=torch.float64, head_dim=DIMS[kv_dtype]), torch.randint(3, 211, (2, 61))
    plan = random_plan(model, case_seed)
    calls = split(61, [20, 1], freeze)
    logits, _ = feed(model, plan, ids, [20, 1], freeze=freeze, **options(kv_dtype))
    torch.testing.assert_close(
        logits, reference_logits(model, plan, ids, None, calls, freeze, kv_dtype=kv_dtype), **TOLERANCE
    )
    sparse, _ = feed(model, plan, ids, [20, 7, 1], prefill="sparse", **options(kv_dtype))
    torch.testing.assert_close(
        sparse, reference_logits(model, plan, ids, None, [1] * 61, kv_dtype=kv_dtype), **TOLERANCE
    )


def close(kv_dtype, found, expected):
    """A key whose numbers lie next to the middle of two may be rounded otherwise, which later tokens see."""
    error = (found.double() - expected).abs().amax(-1)
    assert error.median() < 1e-5
    assert error.max() < (3e-2 if kv_dtype == "int8" else 0.5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[40, 1], [1], [35, 3, 2, 1]], ids=["prompt", "token by token", "few at once"])
@KV_DTYPES
def test_kernels(family, sizes, kv_dtype, case_seed):
    """float64 runs in torch, float32 in compiled kernels."""
    model, exact = (tiny(family, dtype=dtype, head_dim=DIMS[kv_dtype]) for dtype in (torch.float32, torch.float64))
    ids, mask = padded()
    for plan in (random_plan(model, case_seed), Plan.full(model)):
        expected, _ = feed(exact, plan, ids, sizes, mask, **options(kv_dtype))
        close(kv_dtype, feed(model, plan, ids, sizes, mask, **options(kv_dtype))[0][mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@KV_DTYPES
def test_compiled_step(family, dtype, kv_dtype, case_seed):
    model, ids = tiny(family, dtype=dtype, head_dim=DIMS[kv_dtype]), torch.randint(3, 211, (2, 90))
    for plan in (random_plan(model, case_seed), Plan.full(model)):
        _, cache = feed(model, plan, ids[:, :50], [50], **options(kv_dtype))
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
                (key_width, key_dtype), (value_width, value_dtype) = stored(kv_dtype, group.head_dim, dtype)
                assert (own.keys.shape[3], own.keys.dtype) == (key_width, key_dtype)
                assert (own.values.shape[3], own.values.dtype) == (value_width, value_dtype)
                assert own.keys.shape == group.keys.shape


def test_memory():
    model, ids = tiny("llama", dtype=torch.bfloat16, head_dim=64), torch.randint(3, 211, (2, 61))
    caches = [headsink.compress(model, Plan.full(model), ids, kv_dtype=kind) for kind in ("auto", "int8", "k8v4")]
    sizes = [[(group.keys.nbytes, group.values.nbytes) for group in cache.layers[0].groups] for cache in caches]
    slots = sizes[0][0][0] // (2 * 64)
    assert sizes == [[(slots * key, slots * value)] for key, value in ((128, 128), (68, 68), (68, 40))]
    saved = [caches[0].nbytes() - cache.nbytes() for cache in caches]
    assert saved == [0, 3 * slots * 2 * 60, 3 * slots * (60 + 88)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@KV_DTYPES
def test_prefixes(tmp_path, family, kv_dtype, case_seed):
    model, ids = tiny(family, head_dim=DIMS[kv_dtype]), torch.randint(3, 211, (1, 70))
    plan = random_plan(model, case_seed)
    for reconstruct in (False, True):
        cache = headsink.compress(model, plan, ids[:, :60], reconstruct=reconstruct, kv_dtype=kv_dtype)
        path = headsink.save_prefix(tmp_path / f"{reconstruct}", cache, ids[:, :60])
        loaded, seen = headsink.load_prefix(path, model)
        assert loaded.kv_dtype == kv_dtype
        assert torch.equal(seen, ids[:, :60])
        assert loaded.nbytes() <= cache.nbytes()
        with headsink.apply(model, plan, compiled=False), torch.no_grad():
            found, expected = (model(ids[:, 60:], **cache_argument(own)).logits for own in (loaded, cache))
        assert torch.equal(found, expected)


@KV_DTYPES
def test_generation_crops_and_beams(kv_dtype, case_seed):
    """Assisted decoding takes tokens back; beams reorder rows; lossless mode drafts with the rounded cache."""
    model, assistant, ids = (
        tiny("llama", head_dim=DIMS[kv_dtype]),
        tiny("llama", seed=1),
        torch.randint(3, 211, (1, 60)),
    )
    plan, same = random_plan(model, case_seed), {"max_new_tokens": 20, "do_sample": False}
    with headsink.apply(model, plan, **options(kv_dtype)):
        plain = model.generate(ids, **same)
        assisted = model.generate(ids, assistant_model=assistant, **same)
        beams = model.generate(ids, num_beams=3, **same)
    assert torch.equal(plain, assisted)
    assert beams.shape[0] == 1
    assert torch.equal(beams[:, :60], ids)
    found = headsink.generate_lossless(model, plan, ids, kv_dtype=kv_dtype, **same)
    assert torch.equal(found, model.generate(ids, **same))


@KV_DTYPES
def test_refusals(kv_dtype):
    model, ids = tiny("llama", head_dim=DIMS[kv_dtype]), torch.randint(3, 211, (1, 20))
    plan = Plan.full(model)
    with (
        pytest.raises(
            HeadsinkError, match=r"^kv_dtype: 'int4' is none of auto, int8, k8v4; auto is the model's dtype$"
        ),
        headsink.apply(model, plan, kv_dtype="int4"),
    ):
        pass
    with (
        pytest.raises(HeadsinkError, match=f"kv_dtype: '{kv_dtype}' has no gradients"),
        headsink.apply(model, plan, **options(kv_dtype)),
    ):
        model(ids)
    narrow = tiny("llama", head_dim=6)
    multiple = {"int8": 4, "k8v4": 32}[kv_dtype]
    with pytest.raises(HeadsinkError, match=f"head sizes that are multiples of {multiple}, and the model has 6"):
        headsink.new_cache(narrow, Plan.full(narrow), kv_dtype=kv_dtype)


def test_values_in_4_bits_are_refused_on_a_gpu(monkeypatch):
    model = tiny("llama", head_dim=32)
    monkeypatch.setattr("headsink.runtime.apply.input_device", lambda _: torch.device("cuda"))
    with pytest.raises(
        HeadsinkError, match=r"^kv_dtype: 'k8v4' runs on CPUs only, and the model is on cuda; use 'int8'$"
    ):
        headsink.new_cache(model, Plan.full(model), kv_dtype="k8v4")


def test_options_name_the_formats():
    """runtime/options.py does not import torch, so it has the names once more."""
    assert NAMES == ("auto", *FORMATS) == get_args(KVDtype)
