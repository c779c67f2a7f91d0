"""Verification: run a finished plan on calibration documents through its own cache, and judge what it loses.

A document is prefilled once with the full cache (cached_document.py), which gives the log-probabilities of its continuations.
Under each plan the document is prefilled again and compressed, as in use, and the same continuations run over that cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.data.documents import Document
from headsink.evaluation.quality import compare
from headsink.plan.plan import Plan
from headsink.runtime.scoring import continuation_log_probs, read

if TYPE_CHECKING:
    from rich.progress import Progress

RETRIEVAL_WEIGHT = 0.25  # weight of the mean KL of answers in the loss, relative to that of text
VISIBLE = 0.01  # nats per token of text: a smaller delta NLL is not visible
MUCH = 0.1  # nats per token of text: a plan that loses more is warned about
MOST_LOST = 1 / 3  # of the answers: a plan that loses more is warned about


@dataclass(frozen=True)
class FullCacheScores:
    """Scores of a document's continuations with the full cache, the text that follows first, then the questions.

    log_probs: float32 [scored tokens, vocabulary]. targets: int64 [scored tokens]. branch: int64 [scored tokens], index of the
    continuation of each.
    """

    document: Document
    log_probs: Tensor
    targets: Tensor
    branch: Tensor

    def divergences(self, log_probs: Tensor) -> Tensor:
        """Mean KL(full || given) per token of every continuation, float32 [continuations]; the text is the first."""
        kl = (self.log_probs.exp() * (self.log_probs - log_probs)).sum(-1)
        return torch.stack([kl[self.branch == number].mean() for number in range(self._count)])

    def loss(self, log_probs: Tensor) -> float:
        """KL of the text + RETRIEVAL_WEIGHT x the mean KL of the answers."""
        kl = self.divergences(log_probs)
        return float(kl[0] + RETRIEVAL_WEIGHT * kl[1:].mean() if len(kl) > 1 else kl[0])

    @property
    def _count(self) -> int:
        return len(self.document.continuations)


def verify(
    model: PreTrainedModel, plan: Plan, documents: Sequence[FullCacheScores], progress: Progress | None = None
) -> dict[str, Any]:
    """What a plan loses on documents, means over them.

    Returns kl_text, kl_answers and delta_nll in nats per token, and numbers of questions: asked, right_full with the full cache,
    right_both with the full cache and with the plan too.
    """
    texts, answers, kl_answers = [], [], 0.0
    for full in documents:
        cache = read(model, plan, full.document.ids)
        scores = []
        for number, (form, ids, scored) in enumerate(full.document.continuations):
            own = full.branch == number
            log_probs = continuation_log_probs(model, cache, ids, scored)
            scores.append(compare(form, full.log_probs[own], log_probs, full.targets[own]))
        texts.append(scores[0])
        answers += scores[1:]
        kl_answers += sum(float(one.kl.mean()) for one in scores[1:]) / max(len(scores) - 1, 1) / len(documents)
        if progress is not None:
            progress.advance(progress.task_ids[0])
    return {
        "kl_text": round(sum(float(one.kl.mean()) for one in texts) / len(texts), 5),
        "kl_answers": round(kl_answers, 5),
        "delta_nll": round(sum(float((one.nll_plan - one.nll_full).mean()) for one in texts) / len(texts), 5),
        "asked": len(answers),
        "right_full": sum(one.right_full for one in answers),
        "right_both": sum(one.right_full and one.right_plan for one in answers),
    }


def is_lossless(verified: dict[str, Any]) -> bool:
    """Whether a plan has no visible loss: delta NLL of text at most `VISIBLE`, and every answer that the full cache gives."""
    return bool(verified["delta_nll"] <= VISIBLE and verified["right_both"] == verified["right_full"])


def figures(verified: dict[str, Any]) -> str:
    """The figures of a verification in words."""
    return (
        f"delta NLL {verified['delta_nll']:+.4f} nats per token of text, {verified['right_both']} of the "
        f"{verified['right_full']} answers that the full cache gives"
    )


def remark(plan: Plan) -> str | None:
    """One sentence about a plan that calibration made: why it has its budget, or a warning that it loses much; else None."""
    made = plan.calibration
    verified, criterion, smaller = made["verified"], made["criterion"], made["next_smaller"]
    if criterion is None:
        much = verified["delta_nll"] > MUCH
        lost = verified["right_full"] - verified["right_both"]
        if not (much or lost > MOST_LOST * verified["right_full"]):
            return None
        return (
            f"warning: at {made['budget']:.1%} of the KV cache this model loses much: {figures(verified)}; without a budget the "
            "smallest one without visible loss is found"
        )
    what = "without visible loss" if "delta_nll" in criterion else f"with a KL of text up to {criterion['max_kl']}"
    failed = f"; {smaller['budget']:.1%} has {figures(smaller)}, KL {smaller['kl_text']:.4f}" if smaller else ""
    if made["budget"] == 1:
        return f"warning: no budget below 100 % keeps this model {what}, so every head is full{failed}"
    return f"{made['budget']:.1%} of the KV cache is the smallest budget {what}: {figures(verified)}{failed}"
