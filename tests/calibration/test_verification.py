"""What a plan loses on calibration documents: figures, the criterion and the remark on a plan."""

import pytest
import torch
from cached_documents import make_cached_document, random_document
from families import tiny

from headsink import Plan
from headsink.calibration.cached_document import CachedDocument
from headsink.calibration.verification import RETRIEVAL_WEIGHT, FullCacheScores, is_lossless, remark, verify
from headsink.data.documents import Document
from headsink.evaluation.quality import score
from headsink.eviction.pattern import Pattern

MODEL = tiny("llama")


def test_the_loss_matches_its_formula():
    full = make_cached_document(MODEL).full
    other = torch.randn_like(full.log_probs).log_softmax(-1)
    expected = torch.zeros(3)
    for row, number in enumerate(full.branch.tolist()):
        p, q = full.log_probs[row].exp(), other[row].exp()
        expected[number] += (p * (p / q).log()).sum() / (full.branch == number).sum()
    torch.testing.assert_close(full.divergences(other), expected, rtol=1e-4, atol=1e-5)
    assert full.loss(other) == pytest.approx(float(expected[0] + RETRIEVAL_WEIGHT * expected[1:].mean()), rel=1e-4)


def test_a_document_without_questions_has_the_loss_of_its_text():
    document = random_document()
    full = CachedDocument(MODEL, Document(document.ids, document.continuation, [])).full
    other = torch.randn_like(full.log_probs).log_softmax(-1)
    assert full.loss(other) == float(full.divergences(other)[0])
    assert verify(MODEL, Plan.full(MODEL), [full])["asked"] == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_plan_is_verified_on_its_own_cache(family):
    """As the quality of a plan is measured."""
    model = tiny(family, dtype=torch.float64)  # in other dtypes cached documents round keys and values to 16 bits
    plan = Plan.uniform(model, Pattern(2, 0, 20))
    full = []
    for seed in range(2):
        document = random_document(seed)
        scores = CachedDocument(model, document).full
        document.questions[1].ids[-1] = int(scores.log_probs[-1].argmax())  # a question that the full cache answers
        full.append(CachedDocument(model, document).full)
    found = verify(model, plan, full)
    scored = [score(model, [plan], one.document)[0] for one in full]
    texts, answers = [one[0] for one in scored], [answer for one in scored for answer in one[1:]]
    assert found["kl_text"] == pytest.approx(sum(float(t.kl.mean()) for t in texts) / 2, abs=2e-5)
    assert found["kl_answers"] == pytest.approx(sum(float(a.kl.mean()) for a in answers) / 4, abs=2e-5)
    delta = sum(float((t.nll_plan - t.nll_full).mean()) for t in texts) / 2
    assert found["delta_nll"] == pytest.approx(delta, abs=2e-5)
    assert (found["asked"], found["right_full"]) == (4, sum(a.right_full for a in answers))
    assert found["right_full"] >= 2
    assert found["right_both"] == sum(a.right_full and a.right_plan for a in answers)


def verified(delta_nll=0.0, right_both=20):
    return {
        "kl_text": 0.5,
        "kl_answers": 1.0,
        "delta_nll": delta_nll,
        "asked": 24,
        "right_full": 20,
        "right_both": right_both,
    }


def test_without_visible_loss_is_at_most_a_hundredth_of_a_nat_and_every_answer():
    assert is_lossless(verified(0.01, 20))
    assert is_lossless(verified(-0.2, 20))
    assert not is_lossless(verified(0.0101, 20))
    assert not is_lossless(verified(0.0, 19))


def plan_with(budget=0.25, criterion=None, next_smaller=None, **figures):
    made = {"budget": budget, "criterion": criterion, "next_smaller": next_smaller, "verified": verified(**figures)}
    return Plan.full(MODEL).model_copy(update={"calibration": made})


def test_a_budget_that_costs_much_is_warned_about():
    assert remark(plan_with(delta_nll=0.1, right_both=14)) is None
    assert remark(plan_with(delta_nll=0.257, right_both=20)) == (
        "warning: at 25.0% of the KV cache this model loses much: delta NLL +0.2570 nats per token of text, 20 of the 20 answers "
        "that the full cache gives; without a budget the smallest one without visible loss is found"
    )
    assert remark(plan_with(right_both=13)).startswith(
        "warning: at 25.0% of the KV cache this model loses much: delta NLL +0.0000"
    )


def test_a_plan_says_why_it_has_its_budget():
    smaller = {"budget": 0.125} | verified(0.03, 19)
    criterion = {"delta_nll": 0.01, "answers": "all"}
    assert remark(plan_with(criterion=criterion, next_smaller=smaller, delta_nll=0.005)) == (
        "25.0% of the KV cache is the smallest budget without visible loss: delta NLL +0.0050 nats per token of text, "
        "20 of the 20 answers that the full cache gives; 12.5% has delta NLL +0.0300 nats per token of text, "
        "19 of the 20 answers that the full cache gives, KL 0.5000"
    )
    assert "smallest budget with a KL of text up to 0.6: " in remark(plan_with(criterion={"max_kl": 0.6}))
    full = remark(plan_with(budget=1.0, criterion=criterion, next_smaller={"budget": 0.75} | verified(0.03, 19)))
    assert full.startswith(
        "warning: no budget below 100 % keeps this model without visible loss, so every head is full; 75.0% has"
    )


def test_scores_hold_no_keys_or_values():
    """So a document's cache is freed when its scores are kept."""
    full = make_cached_document(MODEL).full
    assert set(vars(full)) == {"document", "log_probs", "targets", "branch"}
    assert isinstance(full, FullCacheScores)
