"""Quality of a plan against the full cache, on held-out text: KL divergence, delta NLL and retrieval accuracy.

A document (data/documents.py) is prefilled once with the full cache and once under the plan. Then each continuation, the text
that follows or a question about the document, runs teacher-forced over both caches and is cropped again, so the prefill does not
depend on the question. The last tokens of a continuation are scored: all but the first of the text, the answer of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from headsink.runtime.scoring import BLOCK, continuation_log_probs, read
from headsink.utils.progress import bar

RESAMPLES = 1000


@dataclass(frozen=True)
class ContinuationScore:
    """One continuation with the full cache and under a plan.

    Per scored token, float64 or bool [tokens]: kl, KL(full || plan) in nats; nll_*, negative log-likelihood in nats; agree,
    whether both have the same most likely token. right_*: whether greedy decoding gives all scored tokens. bytes_*: size of the
    caches after the document.
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


def score(model: PreTrainedModel, plans: Sequence[Plan], document: Document) -> list[list[ContinuationScore]]:
    """Score every continuation of a document under each plan: first the text that follows, then the questions.

    The full cache is prefilled once. Returns a list per plan.
    """
    full = read(model, None, document.ids)
    full_bytes = nbytes(full)
    full_log_probs = [continuation_log_probs(model, full, ids, scored) for _, ids, scored in document.continuations]
    results = []
    for plan in plans:
        lossy = read(model, plan, document.ids)
        sizes = full_bytes, nbytes(lossy)
        results.append(
            [
                compare(
                    form,
                    expected,
                    continuation_log_probs(model, lossy, ids, scored),
                    torch.tensor(ids[-scored:], device=expected.device),
                    sizes,
                )
                for (form, ids, scored), expected in zip(document.continuations, full_log_probs, strict=True)
            ]
        )
    return results


def compare(
    form: str, full: Tensor, plan: Tensor, targets: Tensor, sizes: tuple[int, int] = (0, 0)
) -> ContinuationScore:
    """Compare a continuation with the full cache and under a plan.

    full, plan: log-probabilities, float32 [tokens, vocabulary]; targets: int64 [tokens]; sizes: bytes of both caches.
    """
    kl = (full.exp() * (full - plan)).sum(-1).clamp(min=0)
    nll_full, nll_plan = (-which.gather(1, targets[:, None])[:, 0].double().cpu() for which in (full, plan))
    best_full, best_plan = full.argmax(-1), plan.argmax(-1)
    right_full, right_plan = (bool((best == targets).all()) for best in (best_full, best_plan))
    agree = (best_full == best_plan).cpu()
    return ContinuationScore(form, kl.double().cpu(), nll_full, nll_plan, agree, right_full, right_plan, *sizes)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, context: int, **options: Any
) -> Quality:
    """Measure a plan on documents of `context` tokens, continuation included. Options as for `measure_each`."""
    return measure_each(model, tokenizer, [plan], context, **options)[0]


def measure_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[Plan],
    context: int,
    *,
    documents: int = 1,
    seed: int = 0,
    split: Split = "heldout",
    progress: bool = True,
) -> list[Quality]:
    """Measure plans on the same documents of `context` tokens, continuation included.

    Parameters
    ----------
    documents : number per kind of text in `corpus.DOMAINS`; more documents give narrower intervals.
    split : half of the corpus and of the question forms; plans are calibrated on the other half.
    progress : show a progress bar on standard error.

    Raises HeadsinkError if the context is too short, or longer than the model or the built-in corpus allows.
    """
    made = domain_documents(model, tokenizer, context, documents=documents, seed=seed, split=split)
    scored = []
    with bar(f"quality at {context}", len(made), progress) as shown:
        for document in made:
            scored.append(score(model, plans, document))
            shown.advance(shown.task_ids[0])
    return [summary(context, documents) for documents in zip(*scored, strict=True)]


def domain_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    documents: int = 1,
    seed: int = 0,
    split: Split = "heldout",
) -> list[Document]:
    """Documents of `context` tokens with their continuation, `documents` of every kind of text in `corpus.DOMAINS`.

    Raises HeadsinkError if the context is too short, or longer than the model or the built-in corpus allows.
    """
    check_quality([context], describe(model).max_context, "context")
    return [
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


def summary(context: int, documents: Sequence[Sequence[ContinuationScore]]) -> Quality:
    """Aggregate the scored continuations of documents."""
    continuations = [one for document in documents for one in document]
    texts = [one for one in continuations if one.form == TEXT]
    series = [torch.stack([t.kl, t.agree.double(), t.nll_plan - t.nll_full]) for t in texts]
    kl, top1, delta_nll = intervals(series)
    questions: dict[str, list[ContinuationScore]] = {}
    for one in continuations:
        if one.form != TEXT:
            questions.setdefault(one.form, []).append(one)
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
        nll_change_interval=delta_nll,
        retrieval=tuple(
            Retrieval(
                form=form,
                asked=len(answers),
                right_full=sum(a.right_full for a in answers),
                right_plan=sum(a.right_plan for a in answers),
                nll_full=_mean([a.nll_full for a in answers]),
                nll_plan=_mean([a.nll_plan for a in answers]),
            )
            for form, answers in sorted(questions.items())
        ),
        kv_bytes=sum(document[0].bytes_plan for document in documents) // len(documents),
        kv_bytes_full=sum(document[0].bytes_full for document in documents) // len(documents),
    )


def _mean(parts: Sequence[Tensor]) -> float:
    """The mean over the tokens of all parts."""
    return float(torch.cat(list(parts)).double().mean())


def intervals(documents: Sequence[Tensor], seed: int = 0) -> list[Interval]:
    """95 % bootstrap intervals of means over tokens. documents: float64 [series, tokens] each. Returns an interval per series.

    Blocks of 32 consecutive tokens, which are correlated, are resampled with replacement 1,000 times, within each document
    because documents are few. So the intervals hold for other passages of such documents, not for other kinds of documents.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(RESAMPLES, len(documents[0]), dtype=torch.float64)
    tokens = torch.zeros(RESAMPLES, 1, dtype=torch.float64)
    for document in documents:
        blocks = document.split(BLOCK, 1)
        sample = torch.randint(len(blocks), (RESAMPLES, len(blocks)), generator=generator)
        sums += torch.stack([block.sum(1) for block in blocks])[sample].sum(1)
        tokens += torch.tensor([[block.shape[1]] for block in blocks], dtype=torch.float64)[sample].sum(1)
    mean = torch.cat(list(documents), 1).mean(1)
    low, high = (sums / tokens).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
    low, high = torch.minimum(low, mean), torch.maximum(high, mean)  # rounding could exclude the mean of a constant
    return list(zip(low.tolist(), high.tolist(), strict=True))
