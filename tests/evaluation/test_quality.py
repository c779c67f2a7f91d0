"""The measured quality of a plan equals the same numbers from one masked pass."""

import re

import pytest
import torch
from families import FAMILIES, tiny
from plans import random_plan
from reference import reference_logits

import headsink
from headsink import HeadsinkError, Plan
from headsink.cli.plan import print_plan
from headsink.data.documents import Document, Question
from headsink.evaluation import quality
from headsink.evaluation.quality import compare, intervals, measure, score, summary
from headsink.runtime.scoring import continuation_log_probs, read


def random_document(seed=0, length=150):
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, 211, (count,), generator=generator).tolist()

    return Document(tokens(length), tokens(70), [Question("first", tokens(19), 4), Question("second", tokens(5), 1)])


def continuations(document):
    asked = [(q.ids, q.answer_tokens) for q in document.questions]
    return [(document.continuation, len(document.continuation) - 1), *asked]


@pytest.mark.parametrize("family", FAMILIES)
def test_quality_equals_one_pass_over_everything(family, case_seed):
    model, document = tiny(family, dtype=torch.float64), random_document()
    plan = random_plan(model, case_seed)
    found = score(model, [plan], document)[0]
    assert [branch.form for branch in found] == ["text", "first", "second"]
    for branch, (ids, scored) in zip(found, continuations(document), strict=True):
        text = torch.tensor([document.ids + ids])
        with torch.no_grad():
            segments = [len(document.ids), len(ids)]  # the continuation attends to every key that the document leaves
            both = model(text).logits, reference_logits(model, plan, text, None, segments)
        full, lossy = (logits[0, -scored - 1 : -1].log_softmax(-1) for logits in both)
        targets, rows = torch.tensor(ids[-scored:]), torch.arange(scored)
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(branch.kl, (full.exp() * (full - lossy)).sum(-1), **close)
        torch.testing.assert_close(branch.nll_full, -full[rows, targets], **close)
        torch.testing.assert_close(branch.nll_plan, -lossy[rows, targets], **close)
        assert torch.equal(branch.agree, full.argmax(-1) == lossy.argmax(-1))
        assert branch.right_full == bool((full.argmax(-1) == targets).all())
        assert branch.right_plan == bool((lossy.argmax(-1) == targets).all())


def test_an_answer_is_right_if_all_its_tokens_are():
    targets = torch.tensor([7, 8, 9, 7])
    right = torch.zeros(4, 20).scatter(1, targets[:, None], 1.0)
    wrong = right.clone()
    wrong[2, 5] = 2.0
    found = compare("quote", right.log_softmax(-1), wrong.log_softmax(-1), targets)
    assert (found.right_full, found.right_plan) == (True, False)
    assert found.agree.tolist() == [True, True, False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_that_keeps_everything_costs_nothing(family):
    model = tiny(family)
    found = summary(200, [score(model, [Plan.full(model)], random_document(seed))[0] for seed in range(2)])
    assert found.kl < 1e-6
    assert found.top1 == 1
    assert found.top1_interval == (1, 1)
    assert found.nll_plan == pytest.approx(found.nll_full, abs=1e-6)
    assert all(r.right_plan == r.right_full for r in found.retrieval)
    # The plan's cache grows by 128 slots and has a byte a slot to say which are filled: 256 slots for 150 tokens.
    assert found.kv_bytes < 1.8 * found.kv_bytes_full
    if family != "mistral-sliding":  # transformers' windows are views, which keep the memory of the whole prompt
        assert found.kv_bytes_full <= found.kv_bytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [6, 150])
def test_cropping_a_branch_restores_the_cache(family, length):
    model, document = tiny(family), random_document(length=length)
    lossy = random_plan(model, 1)
    for plan, reconstruct in ((None, False), (lossy, False), (lossy, True)):
        cache = read(model, plan, document.ids, reconstruct)
        first = [continuation_log_probs(model, cache, *branch) for branch in continuations(document)]
        assert cache.get_seq_length() == length
        again = [continuation_log_probs(model, cache, *branch) for branch in reversed(continuations(document))]
        assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


def test_invalid_numbers_of_scored_tokens_are_refused():
    model = tiny("llama")
    cache = read(model, None, [5, 6, 7])
    with pytest.raises(HeadsinkError, match="scored"):
        continuation_log_probs(model, cache, [3, 4], 2)


def test_intervals_contain_the_mean_and_narrow_with_more_text():
    generator = torch.Generator().manual_seed(0)
    few, many = (
        [torch.randn(2, 255, generator=generator, dtype=torch.float64).exp() for _ in range(documents)]
        for documents in (2, 32)
    )
    widths = []
    for documents in (few, many):
        means = torch.cat(documents, 1).mean(1).tolist()
        found = intervals(documents)
        assert all(low <= mean <= high for (low, high), mean in zip(found, means, strict=True))
        assert found == intervals(documents)
        widths.append(found[0][1] - found[0][0])
    assert widths[1] < 0.4 * widths[0]
    deviation = (
        torch.cat([d[0] for d in many]).std() / (32 * 255) ** 0.5
    )  # the standard interval for independent tokens
    assert widths[1] == pytest.approx(2 * 1.96 * float(deviation), rel=0.25)
    assert intervals([torch.full((1, 255), 0.1, dtype=torch.float64)])[0] == pytest.approx((0.1, 0.1))


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return headsink.load(str(tiny_folder), device="cpu")


@pytest.mark.slow
def test_a_plan_is_measured_on_every_kind_of_text(loaded):
    model, tokenizer = loaded
    plan = random_plan(model, 2)
    found = measure(model, tokenizer, plan, 1024, progress=False)
    assert (found.context, found.documents, found.positions) == (1024, 4, 4 * (quality.CONTINUATION - 1))
    assert found.kl > 1e-4
    for mean, (low, high) in [
        (found.kl, found.kl_interval),
        (found.top1, found.top1_interval),
        (found.nll_change, found.nll_change_interval),
    ]:
        assert low <= mean <= high
    assert {r.form for r in found.retrieval} <= set(quality.probes.FORMS["heldout"])
    assert 8 <= found.asked == sum(r.asked for r in found.retrieval)
    assert found.kv_bytes < found.kv_bytes_full
    assert found == measure(model, tokenizer, plan, 1024, progress=False)
    twice = measure(model, tokenizer, plan, 512, documents=2, split="calibration", progress=False)
    assert twice.documents == 8
    assert {r.form for r in twice.retrieval} <= set(quality.probes.FORMS["calibration"])
    with pytest.raises(HeadsinkError, match=r"context: 300 tokens are too few: .*; give 512 to 2048"):
        measure(model, tokenizer, plan, 300, progress=False)


@pytest.mark.slow
def test_a_measured_plan_is_printed(loaded, capsys):
    from rich.console import Console

    model, tokenizer = loaded
    plan = random_plan(model, 2)
    print_plan(Console(width=200), plan)
    assert "Quality was not measured." in capsys.readouterr().out
    found = measure(model, tokenizer, plan, 512, progress=False)
    print_plan(Console(width=200), plan.model_copy(update={"quality": (found,)}))
    out = capsys.readouterr().out
    assert f"{found.kl:.4f} ({found.kl_interval[0]:.4f} to {found.kl_interval[1]:.4f})" in out
    assert f"{found.right_plan} of {found.asked}" in out
    assert "Verified up to 512 tokens." in out
    share = found.kv_bytes / found.kv_bytes_full
    assert "At 512 tokens the document has 256, and the rest is scored" in out
    assert f"{share:.1%} of the bytes and {plan.kv_budget(256):.1%} of the entries." in out
    assert plan.kv_budget(256) == pytest.approx(share, abs=0.02)
    assert plan.kv_budget(512) < 0.6 * plan.kv_budget(256)  # so the two lines differ clearly


def test_a_plan_of_many_patterns_is_printed_by_shares(capsys):
    from rich.console import Console

    model = tiny("llama-mha")
    sizes = [0, 3, 10, 30, 60, 120, 240, 400, 700, 900, 995, 1000]
    rows = [[headsink.Pattern(0, 0, size) for size in sizes[4 * layer : 4 * layer + 4]] for layer in range(3)]
    print_plan(Console(width=80), Plan.of(model, rows, calibration={"context": [1000, 1000]}))
    out = capsys.readouterr().out
    assert "Kept at 1000 tokens" in out
    found = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if re.search(r"\s{2,}\d+\s*$", line)]
    assert found == [
        ["all", "1"],
        ["50.0% to 100.0%", "3"],
        ["25.0% to 50.0%", "1"],
        ["12.5% to 25.0%", "1"],
        ["6.2% to 12.5%", "1"],
        ["3.1% to 6.2%", "1"],
        ["under 3.1%", "4"],
    ]
