"""Calibration, quality and census of the built-in model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import headsink
from headsink.census.head_statistics import windows
from headsink.census.sink_tokens import secondary_tokens, suggested_tau
from headsink.data import corpus, documents
from headsink.evaluation.quality import score

pytestmark = pytest.mark.slow

PLANS = Path(__file__).parents[2] / "benchmarks/results/all/plans"
TOKENS = 2000


def test_the_half_plan_answers_what_the_full_cache_answers(smollm2):
    """The committed plan, on text and question forms that calibration did not use; the document is read before the question is
    known."""
    model, tokenizer = smollm2
    plan = headsink.Plan.load(PLANS / f"smollm2-{TOKENS}-0.5.json")
    assert 0.4 < plan.kv_budget(TOKENS) <= 0.5
    assert plan.has_top_k  # it finds secondary sinks
    document = documents.document(tokenizer, TOKENS - 256, split="heldout", seed=5)
    questions = [q for q in document.questions if q.form in ("locker", "flower")]
    assert len(questions) == 2
    text, *answers = score(model, [plan], replace(document, questions=questions))[0]
    assert any(answer.right_full for answer in answers)
    for answer in answers:
        assert answer.right_plan or not answer.right_full
    assert text.bytes_plan < 0.6 * text.bytes_full
    assert float(text.kl.mean()) < 0.1


def test_a_quarter_of_the_cache_answers_what_the_full_cache_answers(smollm2):
    """On held-out text. The plan is calibrated here."""
    model, tokenizer = smollm2
    plan = headsink.calibrate(model, tokenizer, budget=0.25, context=700, quality_contexts=(), progress=False)
    assert plan.calibration["verified"]["right_full"] > 8
    document = documents.document(tokenizer, 600, split="heldout", seed=5)
    scored = score(model, [plan], document)[0]
    assert scored[0].bytes_plan < 0.26 * 700 / len(document.ids) * scored[0].bytes_full  # the plan is for 700 tokens
    assert any(answer.right_full for answer in scored[1:])
    assert all(answer.right_plan or not answer.right_full for answer in scored[1:])
    assert float(scored[0].kl.mean()) < 0.05


def test_census_sees_the_first_token_and_the_secondary_sinks(smollm2):
    """Known results of this model: no sinks in layers 0 and 1, sinks from layer 12, secondary sinks in layers 3 to 10."""
    model, tokenizer = smollm2
    census = headsink.analyze(model, tokenizer, lengths=(1024,), domains=("prose",), progress=False)
    first, sink = census.score("first", 1024), census.score("sink", 1024)
    assert float(first[:2].max()) < 0.3
    assert float(first[12:].mean()) > 0.25
    assert float(sink[3:11].mean()) > float(first[3:11].mean()) + 0.1
    errors = census.score("errors", 1024)[..., windows(1024).index(128)]  # [layers, heads, kept]
    first_only, secondary_too = errors[3:11].mean((0, 1)).tolist()
    assert first_only > 2 * secondary_too
    assert suggested_tau(census, 1024) == 0.4
    assert any(row["token"] == " the" for row in secondary_tokens(census, 1024, most=3))


def test_all_full_plan_gives_the_models_tokens(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([corpus.tokens("prose", tokenizer, 300, split="heldout")])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with headsink.apply(model, headsink.Plan.full(model)):
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)
