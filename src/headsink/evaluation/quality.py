"""What a plan costs: the model under the plan beside the model itself, on text that calibration never saw.

A document (probes.py) is read once by the model itself and once under the plan, through the cache that it will be used with.
Then each branch, the text that follows or a question about the document, runs over both caches and is taken back again, so
neither reading knew what would be asked. The last tokens of a branch are scored, each predicted from the one before: all
but the first of the text, the answer of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.cache.cache import nbytes
from headsink.data import corpus
from headsink.data import documents as probes
from headsink.data.corpus import Split
from headsink.data.documents import TEXT, Document
from headsink.evaluation.options import CONTINUATION, check_quality
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.plan.schema import Interval, Quality, Retrieval
from headsink.runtime.scoring import BLOCK, branch_log_probs, read
from headsink.utils.progress import bar

RESAMPLES = 1000


@dataclass(frozen=True)
class Scored:
    """One branch with the model itself and under a plan.

    Of every scored token: kl, KL(full || plan) in nats; nll_*, of the token that stands there; agree, whether both find the
    same token most likely (float64 and bool, [tokens]). right_*: whether greedy decoding would have given all of them.
    bytes_*: what the caches held after the document.
    """

    form: str
    kl: Tensor
    nll_full: Tensor
    nll_plan: Tensor
    agree: Tensor
    right_full: bool
    right_plan: bool
    bytes_full: int
    bytes_plan: int


def score(model: PreTrainedModel, plan: Plan, document: Document) -> list[Scored]:
    """Every branch of a document: the text that follows first, then the questions."""
    return score_each(model, [plan], document)[0]


def score_each(model: PreTrainedModel, plans: Sequence[Plan], document: Document) -> list[list[Scored]]:
    """The same under each plan; the model itself reads the document once."""
    full = read(model, None, document.ids)
    held = nbytes(full)
    own = [branch_log_probs(model, full, ids, scored) for _, ids, scored in document.branches]
    found = []
    for plan in plans:
        lossy = read(model, plan, document.ids)
        sizes = held, nbytes(lossy)
        found.append(
            [
                _compare(
                    form,
                    expected,
                    branch_log_probs(model, lossy, ids, scored),
                    torch.tensor(ids[-scored:], device=expected.device),
                    sizes,
                )
                for (form, ids, scored), expected in zip(document.branches, own, strict=True)
            ]
        )
    return found


def _compare(form: str, full: Tensor, plan: Tensor, targets: Tensor, sizes: tuple[int, int]) -> Scored:
    """full, plan: log-probabilities [tokens, vocabulary]; targets: [tokens]."""
    kl = (full.exp() * (full - plan)).sum(-1).clamp(min=0)
    nll_full, nll_plan = (-which.gather(1, targets[:, None])[:, 0].double().cpu() for which in (full, plan))
    best_full, best_plan = full.argmax(-1), plan.argmax(-1)
    right_full, right_plan = (bool((best == targets).all()) for best in (best_full, best_plan))
    agree = (best_full == best_plan).cpu()
    return Scored(form, kl.double().cpu(), nll_full, nll_plan, agree, right_full, right_plan, *sizes)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    context: int,
    *,
    documents: int = 1,
    seed: int = 0,
    split: Split = "heldout",
    progress: bool = True,
) -> Quality:
    """Measure a plan on texts of `context` tokens, their continuation included.

    Parameters
    ----------
    documents : how many of each kind of text in `corpus.DOMAINS`; more of them narrow the intervals.
    split : the half of the text and of the forms of questions; plans are made with the other one.
    progress : show a bar on standard error.

    Raises HeadsinkError if the context is too short, or longer than the model or the built-in text allows.
    """
    most = describe(model).max_context
    check_quality([context], most, "context")
    made = [
        probes.document(
            tokenizer,
            context - CONTINUATION,
            split=split,
            seed=seed + number,
            domains=(domain,),
            continuation=CONTINUATION,
        )
        for number in range(documents)
        for domain in corpus.DOMAINS
    ]
    found = []
    with bar(f"quality at {context}", len(made), progress) as shown:
        for document in made:
            found.append(score(model, plan, document))
            shown.advance(shown.task_ids[0])
    return summary(context, found)


def summary(context: int, documents: Sequence[Sequence[Scored]]) -> Quality:
    """The quality that the branches of some documents show."""
    branches = [branch for document in documents for branch in document]
    texts = [branch for branch in branches if branch.form == TEXT]
    series = [torch.stack([t.kl, t.agree.double(), t.nll_plan - t.nll_full]) for t in texts]
    kl, top1, nll_change = intervals(series)
    asked: dict[str, list[Scored]] = {}
    for branch in branches:
        if branch.form != TEXT:
            asked.setdefault(branch.form, []).append(branch)
    return Quality(
        context=context,
        documents=len(documents),
        positions=sum(len(t.kl) for t in texts),
        kl=_mean([t.kl for t in texts]),
        kl_interval=kl,
        top1=_mean([t.agree for t in texts]),
        top1_interval=top1,
        nll_full=_mean([t.nll_full for t in texts]),
        nll_plan=_mean([t.nll_plan for t in texts]),
        nll_change_interval=nll_change,
        retrieval=tuple(
            Retrieval(
                form=form,
                asked=len(answers),
                right_full=sum(a.right_full for a in answers),
                right_plan=sum(a.right_plan for a in answers),
                nll_full=_mean([a.nll_full for a in answers]),
                nll_plan=_mean([a.nll_plan for a in answers]),
            )
            for form, answers in sorted(asked.items())
        ),
        kv_bytes=sum(document[0].bytes_plan for document in documents) // len(documents),
        kv_bytes_full=sum(document[0].bytes_full for document in documents) // len(documents),
    )


def _mean(parts: Sequence[Tensor]) -> float:
    """The mean over the tokens of all parts."""
    return float(torch.cat(list(parts)).double().mean())


def intervals(documents: Sequence[Tensor], seed: int = 0) -> list[Interval]:
    """95 % intervals of means over tokens. documents: float64 [series, tokens] of each; an interval for each series.

    A bootstrap: blocks of 32 consecutive tokens, which depend on one another, are drawn again with replacement, 1,000 times.
    Documents are few, so blocks are drawn within each of them: the intervals say how far the numbers would move on other
    passages of such documents, not on documents of another kind.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(RESAMPLES, len(documents[0]), dtype=torch.float64)
    tokens = torch.zeros(RESAMPLES, 1, dtype=torch.float64)
    for document in documents:
        blocks = document.split(BLOCK, 1)
        drawn = torch.randint(len(blocks), (RESAMPLES, len(blocks)), generator=generator)
        sums += torch.stack([block.sum(1) for block in blocks])[drawn].sum(1)
        tokens += torch.tensor([[block.shape[1]] for block in blocks], dtype=torch.float64)[drawn].sum(1)
    mean = torch.cat(list(documents), 1).mean(1)
    low, high = (sums / tokens).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
    low, high = torch.minimum(low, mean), torch.maximum(high, mean)  # else a constant could miss its mean by rounding
    return list(zip(low.tolist(), high.tolist(), strict=True))
