"""Ablation of heads: what a model loses when a set of heads sees only the keys of a pattern, beside random sets of heads.

The model reads held-out documents (data/documents.py) with all heads as they are, then with the set limited (limited.py), then
with each random set limited in the same way. Delta NLL and KL are over the text that follows a document, retrieval accuracy over
the questions about its needles. Intervals are those of evaluation/quality.py: all sets are scored on the same tokens and
resampled together, so the difference from random sets is paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.data.documents import TEXT, Document
from headsink.errors import HeadsinkError
from headsink.evaluation.head_sets import Heads, HeadSet, Null, names
from headsink.evaluation.limited import Limit, LimitedDocument, mean_outputs
from headsink.evaluation.options import ABLATION_CONTEXT, DRAWS, MEAN, check_null, head_pattern
from headsink.evaluation.quality import ContinuationScore, compare, domain_documents, intervals
from headsink.eviction.pattern import FULL, Pattern
from headsink.models.builtin import title
from headsink.models.spec import Architecture, describe
from headsink.plan.schema import Interval
from headsink.utils.format import html_table
from headsink.utils.progress import bar


@dataclass(frozen=True)
class HeadCost:
    """What limiting a set of heads costs. heads: pairs of layer and head.

    delta_nll, kl: means over the scored tokens of text in nats, with 95 % intervals. right: number of right answers.
    answer_delta_nll: mean over the tokens of the answers in nats; None without questions.
    """

    heads: HeadSet
    delta_nll: float
    delta_nll_interval: Interval
    kl: float
    kl_interval: Interval
    right: int
    answer_delta_nll: float | None


@dataclass(frozen=True)
class Ablation:
    """Result of `ablate`.

    pattern: what the heads see, as text; "mean" if their output was replaced. kv_heads: whether heads are KV heads. tokens:
    scored tokens of text. nll_full: NLL of the model as it is, nats per token. asked, right_full: questions, and right answers of
    the model as it is. cost: of the chosen heads. random_sets: of each random set. excess: delta NLL of the chosen heads minus
    the mean of the random sets, paired by token, with its 95 % interval over passages; None without random sets.
    """

    model: str
    pattern: str
    kv_heads: bool
    null: str
    seed: int
    context: int
    documents: int
    tokens: int
    nll_full: float
    asked: int
    right_full: int
    cost: HeadCost
    random_sets: tuple[HeadCost, ...]
    excess: float | None
    excess_interval: Interval | None

    @property
    def below(self) -> int:
        """Number of random sets that cost less NLL than the chosen heads."""
        return sum(one.delta_nll < self.cost.delta_nll for one in self.random_sets)

    @property
    def p(self) -> float:
        """One-sided Monte Carlo p of the hypothesis that the heads cost no more NLL than random ones: at least 1 / (sets + 1)."""
        return (1 + len(self.random_sets) - self.below) / (1 + len(self.random_sets))

    def summary(self) -> dict[str, str]:
        """Rows of text: {title: text}."""
        cost, what = self.cost, "KV heads" if self.kv_heads else "query heads"
        limited = "replaced by their mean output" if self.pattern == MEAN else f"limited to {self.pattern}"
        rows = {
            "heads": f"{len(cost.heads)} {what} of {self.model}, {limited}",
            "text": f"delta NLL {_signed(cost.delta_nll, cost.delta_nll_interval)} nats per token",
            "answers": f"{cost.right} of {self.asked} right, without limits {self.right_full}",
        }
        if self.excess is not None and self.excess_interval is not None:
            deltas, right = [one.delta_nll for one in self.random_sets], [one.right for one in self.random_sets]
            where = "the same layers" if self.null == "layers" else "all layers"
            rows["random"] = (
                f"{len(deltas)} random sets of {where}: delta NLL {sum(deltas) / len(deltas):+.4f} "
                f"({min(deltas):+.4f} to {max(deltas):+.4f}), {sum(right) / len(right):.1f} right ({min(right)} to {max(right)})"
            )
            rows["difference"] = (
                f"{_signed(self.excess, self.excess_interval)} nats per token; more than {self.below} of "
                f"{len(deltas)} random sets, p {self.p:.2g}"
            )
        return rows

    def __str__(self) -> str:
        return "; ".join(self.summary().values())

    def _repr_html_(self) -> str:
        return html_table("Ablation", self.summary())

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values; heads as text, "3.2,5.0"."""
        found = {"headsink": version("headsink"), **asdict(self), "below": self.below, "p": self.p}
        for one in (found["cost"], *found["random_sets"]):
            one["heads"] = names(one["heads"])
        return found


def ablate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heads: str | Iterable[tuple[int, int]],
    pattern: Pattern | str = Pattern(4, 0, 256),  # noqa: B008 (frozen)
    *,
    kv_heads: bool = False,
    null: Null = "layers",
    draws: int = DRAWS,
    context: int = ABLATION_CONTEXT,
    documents: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Ablation:
    """Measure what a set of heads is worth: what the model loses if only these heads are limited to a pattern.

    Parameters
    ----------
    heads : pairs of layer and head, counted from 0 over all layers of the model, or "3.2,5.*" (* is every head of the layer).
    pattern : what the heads may see, for every query; its top-k keys are those that the query itself attends to most.
        `Pattern(0, 0, 0)` removes the heads: their output is zero. "mean": their output is their mean over other text. Also text
        as `Pattern.parse` takes it, "4+256".
    kv_heads : whether `heads` are KV heads; all query heads of their groups are limited.
    null : where random heads are drawn: "layers", as many from each layer as in `heads`, or "all", from all layers.
    draws : number of random sets of heads.
    context : tokens of a document and the 256 that follow it.
    documents : held-out documents of each kind of text (`corpus.DOMAINS`); more give narrower intervals.
    seed : of documents and random heads.
    progress : show a progress bar on standard error.

    Returns
    -------
    Ablation.

    Raises HeadsinkError for heads that the model does not have, for a context that is too short or too long, if random sets
    could only be `heads` again, and for a model that tensor parallelism splits.
    """
    shape = describe(model)
    _check(shape)
    check_null(null, draws)
    if documents < 1:
        raise HeadsinkError(f"documents: {documents} is too few; give 1 or more")
    pattern = head_pattern(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(pattern, Pattern | str):
        raise HeadsinkError(f"pattern: {pattern!r} is not a Pattern; give Pattern(sink, top_k, window) or 'mean'")
    every = Heads(shape, kv_heads)
    chosen = every.read(heads)
    random = every.draw(chosen, null, draws, seed)
    texts = domain_documents(model, tokenizer, context, documents=documents, seed=seed)
    output = None
    if isinstance(pattern, str):
        other = domain_documents(model, tokenizer, context, seed=seed, split="calibration")
        output = mean_outputs(model, [one.ids for one in other])
    seen = FULL if isinstance(pattern, str) else pattern
    limits = {one: Limit(every.query_heads(one), seen, output) for one in (chosen, *random)}
    scores = measure(model, texts, limits, progress)
    costs, (excess, excess_interval) = _costs(scores, chosen, random)
    asked = [one for document in scores[chosen] for one in document if one.form != TEXT]
    nll = torch.cat([one.nll_full for document in scores[chosen] for one in document if one.form == TEXT])
    return Ablation(
        model=title(model.config.name_or_path, type(model).__name__),
        pattern=str(pattern),
        kv_heads=kv_heads,
        null=null,
        seed=seed,
        context=context,
        documents=len(texts),
        tokens=len(nll),
        nll_full=float(nll.mean()),
        asked=len(asked),
        right_full=sum(one.right_full for one in asked),
        cost=costs[chosen],
        random_sets=tuple(costs[one] for one in random),
        excess=excess,
        excess_interval=excess_interval,
    )


def _check(shape: Architecture) -> None:
    shape.refuse("ablate", "chunked_attention")
    if shape.latent or shape.value_dim not in (None, shape.head_dim):
        raise HeadsinkError(f"ablate: {shape.name} has keys and values of different sizes; not supported")


Scores = dict[HeadSet, list[list[ContinuationScore]]]  # by document, then by continuation


def measure(
    model: PreTrainedModel, documents: Sequence[Document], limits: dict[HeadSet, Limit], progress: bool = False
) -> Scores:
    """Score every continuation of every document under each limit against the model as it is."""
    scores: Scores = {one: [] for one in limits}
    with bar("ablation", len(documents) * (1 + len(limits)), progress) as shown:
        for document in documents:
            text = LimitedDocument(model, document)
            full = text.log_probs(Limit())
            shown.advance(shown.task_ids[0])
            for one, limit in limits.items():
                forms = [form for form, *_ in document.continuations]
                found = zip(forms, full, text.log_probs(limit), text.targets, strict=True)
                scores[one].append([compare(*each) for each in found])
                shown.advance(shown.task_ids[0])
    return scores


def _costs(
    scores: Scores, chosen: HeadSet, random: Sequence[HeadSet]
) -> tuple[dict[HeadSet, HeadCost], tuple[float | None, Interval | None]]:
    """The cost of every set, and the excess of the chosen one over the mean of the random ones with its interval."""
    series = []
    for number in range(len(scores[chosen])):
        texts = {one: next(c for c in of[number] if c.form == TEXT) for one, of in scores.items()}
        delta = {one: text.nll_plan - text.nll_full for one, text in texts.items()}
        rows = [*delta.values(), *(text.kl for text in texts.values())]
        if random:
            rows.append(delta[chosen] - torch.stack([delta[one] for one in random]).mean(0))
        series.append(torch.stack(rows))
    means = torch.cat(series, 1).mean(1).tolist()
    ranges = intervals(series)
    costs = {}
    for n, (heads, of_documents) in enumerate(scores.items()):
        answers = [one for document in of_documents for one in document if one.form != TEXT]
        changes = [one.nll_plan - one.nll_full for one in answers]
        costs[heads] = HeadCost(
            heads=heads,
            delta_nll=means[n],
            delta_nll_interval=ranges[n],
            kl=means[n + len(scores)],
            kl_interval=ranges[n + len(scores)],
            right=sum(one.right_plan for one in answers),
            answer_delta_nll=float(torch.cat(changes).mean()) if changes else None,
        )
    return costs, (means[-1], ranges[-1]) if random else (None, None)


def _signed(value: float, interval: Interval) -> str:
    return f"{value:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"
