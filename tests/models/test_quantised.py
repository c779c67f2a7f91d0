"""Models quantised by torchao run under the plans of the original models."""

import sys
from pathlib import Path

import pytest
import torch
from families import tiny
from plans import random_plan
from reference import reference_logits

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.decoding.step import refusal
from headsink.models.fingerprint import weights_hash

pytestmark = pytest.mark.slow

sys.path.append(str(Path(__file__).parents[2] / ".venv" / "torchao"))  # where `make setup` puts it
quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: make setup")


def int4(group: int):
    granularity = quantization.PerGroup(group)
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)


KINDS = {"int8": quantization.Int8WeightOnlyConfig(), "int4": int4(16)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_copy_runs_under_the_plan(kind):
    model = tiny("llama")
    plan, ids = random_plan(model, 1), torch.randint(3, 211, (1, 40))
    quantization.quantize_(model, KINDS[kind])
    assert "no plain matrix" in refusal(model)
    with headsink.apply(model, plan), torch.no_grad():
        found = model(ids).logits
    torch.testing.assert_close(found, reference_logits(model, plan, ids), rtol=1e-4, atol=1e-4)
    own = Plan.full(model)
    with headsink.apply(model, own), torch.no_grad():
        found = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits)
    assert torch.equal(
        headsink.generate_lossless(model, plan, ids, max_new_tokens=8, do_sample=False),
        model.generate(ids, max_new_tokens=8, do_sample=False),
    )
    other = tiny("llama", seed=1)
    quantization.quantize_(other, KINDS[kind])
    with pytest.raises(HeadsinkError, match="other weights: the hash of unquantised is"):
        own.check(other)
    with pytest.raises(HeadsinkError, match="other weights: the hash of weights is"):
        own.check(tiny("llama"))  # its linear layers differ from those of the plan's model


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_float16_copy_is_recognised(kind):
    model = tiny("llama")
    plan, other = random_plan(model, 1), tiny("llama", seed=1)
    for found in (model, other):
        found.half()
        quantization.quantize_(found, KINDS[kind])
    assert weights_hash(model, linears=False) != plan.model.unquantised
    assert plan.check(model)
    with pytest.raises(HeadsinkError, match="other weights: the hash of unquantised is"):
        plan.check(other)


def test_quantised_smollm2_runs_under_a_plan():
    model, tokenizer = headsink.load("smollm2", device="cpu", dtype="bfloat16")
    plan = Plan.uniform(model, Pattern(4, 0, 256))
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    for kind in ("int8", "int4"):
        quantised, _ = headsink.load("smollm2", device="cpu", dtype="bfloat16")
        config = int4(32) if kind == "int4" else KINDS[kind]
        quantization.quantize_(quantised, config)
        with headsink.apply(quantised, plan):
            text = tokenizer.decode(quantised.generate(ids, max_new_tokens=8, do_sample=False)[0])
        assert "Paris" in text
