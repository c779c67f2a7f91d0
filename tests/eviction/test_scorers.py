"""A scorer of one's own: one class and one entry in `SCORERS`, without kernels."""

import pytest
import torch
from families import tiny
from feeding import TOLERANCE, WAYS, feed, padded, split
from plans import random_plan
from reference import reference_logits
from small_tokenizer import Small

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.calibration import calibrate as calibrate_module
from headsink.calibration.calibrate import Calibration
from headsink.calibration.method import Method
from headsink.decoding.step import refusal
from headsink.eviction.scorers import LINEAR, SCORERS, Scorer
from headsink.generation.generate import generate
from headsink.models.transformers_names import cache_argument


class Example(Scorer):
    """The first coordinate of the key, so that equal tokens at different positions differ, and the norm of the value."""

    name = "example"

    def n_features(self, dim):
        return 2

    def features(self, key, value):
        kind = torch.promote_types(key.dtype, torch.float32)
        return torch.stack([key[..., 0].to(kind), value.to(kind).norm(dim=-1)], -1)


EXAMPLE = Example()


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(SCORERS, "example", EXAMPLE)


def top_k_pattern(rng):
    return Pattern(rng.choice([0, 1, 3]), rng.choice([2, 5, 9]), rng.choice([0, 1, 5, 8]))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_a_plan_with_it_equals_the_reference(family, way, padding, case_seed):
    exact, model = tiny(family, dtype=torch.float64), tiny(family)
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    real = slice(None) if mask is None else mask.bool()
    plan = random_plan(exact, case_seed, top_k_pattern, EXAMPLE)
    for freeze in (None, 45):
        expected = reference_logits(exact, plan, ids, mask, split(61, WAYS[way], freeze), freeze)
        found, _ = feed(exact, plan, ids, WAYS[way], mask, freeze)
        torch.testing.assert_close(found[real], expected[real], **TOLERANCE)
        found, _ = feed(
            model, plan, ids, WAYS[way], mask, freeze, exact=False
        )  # kernels for attention, torch for scores
        torch.testing.assert_close(found[real].double(), expected[real], rtol=0, atol=3e-5)


@pytest.mark.slow
def test_calibration_fits_it_and_the_plan_names_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_module, "FEW", 0)  # no coordinate descent
    model = tiny("llama", dtype=torch.float64)
    model.config.max_position_embeddings = 1024
    method = Method(scorer="example")
    calibration = Calibration(model, Small(tokenizer), context=600, method=method, progress=False)
    assert calibration.weights.shape[-1] == 2
    plan = calibration.plan(0.4)
    assert plan.scorer == "example"
    assert plan.has_top_k
    assert Plan.load(plan.save(tmp_path / "plan.json")).scorer == "example"
    found = plan.calibration
    other = Calibration(model, Small(tokenizer), context=600, progress=False).plan(0.4)
    assert found["verified"] != other.calibration["verified"]


def test_decoding_uses_the_models_passes(tokenizer):
    model = tiny("llama")
    plan, ids = random_plan(model, 1, top_k_pattern, EXAMPLE), list(range(3, 60))
    assert "'example' has no kernel" in refusal(model, plan)
    assert refusal(model, random_plan(model, 1)) is None
    assert refusal(model, Plan.uniform(model, Pattern(1, 0, 5), scorer="example")) is None  # nothing is scored
    text = torch.tensor([ids])
    with headsink.apply(model, plan):
        expected = model.generate(text, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    with pytest.raises(HeadsinkError, match="'example' has no kernel"), headsink.apply(model, plan, compiled=True):
        pass
    assert generate(model, tokenizer, ids, plan, max_new_tokens=12).ids == expected
    full = model.generate(text, max_new_tokens=12, do_sample=False)
    assert torch.equal(headsink.generate_lossless(model, plan, text, max_new_tokens=12, do_sample=False), full)


def test_a_prefix_keeps_it(tmp_path):
    model = tiny("llama")
    plan, ids = random_plan(model, 1, top_k_pattern, EXAMPLE), torch.randint(3, 211, (1, 40))
    _, cache = feed(model, plan, ids, [40])
    headsink.save_prefix(tmp_path / "p.kv", cache, ids)
    loaded, _ = headsink.load_prefix(tmp_path / "p.kv", model)
    assert loaded.plan == plan
    again = torch.randint(3, 211, (1, 20))
    with headsink.apply(model, plan), torch.no_grad():
        expected, found = (model(again, **cache_argument(one)).logits for one in (cache, loaded))
    torch.testing.assert_close(found, expected)


def test_an_unknown_scorer_and_wrong_weights_are_refused(monkeypatch, tmp_path):
    model = tiny("llama")
    with pytest.raises(HeadsinkError, match="scorer: 'best' is unknown; one of linear, example"):
        Calibration(model, None, context=500, method=Method(scorer="best"))
    plan = random_plan(model, 1, top_k_pattern, EXAMPLE)
    file = plan.save(tmp_path / "plan.json")
    other = tmp_path / "other.json"
    other.write_text(file.read_text().replace('"example"', '"linear"'))
    with pytest.raises(HeadsinkError, match=r"2 weights given, heads of size 12 need 30"):
        Plan.load(other)
    monkeypatch.delitem(SCORERS, "example")
    with pytest.raises(HeadsinkError, match="scorer: 'example' is unknown; one of linear"):
        Plan.load(file)
    assert random_plan(model, 1).scorer == LINEAR.name
