"""Calibrate a plan: read documents, allocate a budget to heads, verify the plan on its cache, measure its quality.

Documents from the calibration half of the corpus, ordinary text with needles, are read one at a time at the context that the plan
is for. Context reconstruction gives the importance of their keys, by which heads compete for the budget (allocation.py) and to
which scorer weights are fitted (score_fit.py). Then the plan runs on its own cache over the same documents (verification.py), and
over held-out documents (evaluation/quality.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.calibration.allocation import FEW, FLOOR, SWEEPS, allocate, coordinate_descent, smallest
from headsink.calibration.cached_document import CachedDocument, mean_loss
from headsink.calibration.checkpoint import Checkpoint, Step, check_checkpoint
from headsink.calibration.method import Method
from headsink.calibration.policies import candidates, choose_patterns, needs_errors
from headsink.calibration.score_fit import ScorerFit, measure_importance
from headsink.calibration.verification import VISIBLE, FullCacheScores, is_lossless, remark, verify
from headsink.compression.reconstruction import prompt_tokens
from headsink.data import corpus, documents
from headsink.data.corpus import Domain
from headsink.data.documents import Document
from headsink.data.domains import check_domains
from headsink.errors import HeadsinkError
from headsink.evaluation.options import LEAST_QUALITY, TAIL, check_budget, check_context, check_max_kl, check_quality
from headsink.evaluation.quality import measure
from headsink.eviction.pattern import FULL, Pattern
from headsink.eviction.scorers import find_scorer
from headsink.models import timing
from headsink.models.devices import dtype_name
from headsink.models.distributed import rank_heads
from headsink.models.fingerprint import Fingerprint
from headsink.models.spec import check_plannable, describe
from headsink.plan.plan import Plan
from headsink.utils.progress import bar
from headsink.utils.terminal import note

DOCUMENTS = len(corpus.DOMAINS)  # least number of calibration documents
CONTINUATION = 128  # tokens of the continuation of a document
VERIFIED = 8_000  # tokens of documents on which a plan is verified, at least one document
BUDGETS = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)  # candidates if no budget is given: three are tried

Context = int | tuple[int, int]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: Context,
    budget: float | None = None,
    max_kl: float | None = None,
    method: Method | None = None,
    quality_contexts: Sequence[int] | None = None,
    domains: Sequence[Domain] = corpus.DOMAINS,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Plan:
    """Calibrate a plan: of the smallest budget without visible loss, of a given budget, or as small as `max_kl` allows.

    Parameters
    ----------
    context : tokens of prompt and output together that the plan is for. With a range (shortest, longest) the budget holds at the
        shortest context, and so at all of them, since windows are constant; errors are measured at both ends.
    budget : fraction of the full KV cache that is kept, over layers without a sliding window; above 0, at most 1. By default the
        smallest of `BUDGETS` without visible loss on the calibration documents: delta NLL of text at most 0.01 nats per token,
        and every needle found that the full cache finds. It is 1 if 0.75 loses more.
    max_kl : instead of a budget: largest KL(full || plan) on the text of the calibration documents, in nats per token. Takes the
        smallest of `BUDGETS` that satisfies it.
    method : how patterns are chosen; the default is headsink's. Others, such as `Method(policy="streaming-llm")`, are baselines.
    quality_contexts : contexts in tokens at which quality is measured on held-out text; by default `context` and a shorter one,
        () for none.
    domains : kinds of text of the calibration documents, used in turn; there are at least four documents.
    checkpoint : a file with the finished steps of coordinate descent, which models with few heads need; an interrupted run
        continues from it, given the same arguments.
    progress : show progress bars on standard error, and a remark on the plan: why it has its budget, or that it loses much.

    Returns
    -------
    Plan, with its measured quality. Its `calibration` records the criterion and what was measured (`verified`), and the same for
    the next smaller budget, which failed.

    Raises HeadsinkError for invalid or contradictory arguments and for models without a layer to plan.
    """
    if budget is not None and max_kl is not None:
        raise HeadsinkError("budget: give a budget or max_kl, one of the two, or neither")
    if budget is not None:
        check_budget(budget)
    if max_kl is not None:
        check_max_kl(max_kl)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    most = describe(model).max_context
    check_quality(quality_contexts or (), most)
    longest = context if isinstance(context, int) else context[1]
    if progress and longest <= most:
        measured = default_quality_contexts(longest) if quality_contexts is None else quality_contexts
        timing.print_estimate("plan", model, longest + sum(measured), timing.PLAN)
    calibration = Calibration(
        model,
        tokenizer,
        context=context,
        method=method,
        domains=domains,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    if budget is not None:
        plan = calibration.plan(budget)
    else:
        plan = calibration.plan_without_loss() if max_kl is None else calibration.plan_within(max_kl)
    if quality_contexts is None:
        quality_contexts = default_quality_contexts(calibration.longest)
    quality = [measure(model, tokenizer, plan, n, seed=seed, progress=progress) for n in quality_contexts]
    if progress and (text := remark(plan)) is not None:
        note(text)
    return plan.model_copy(update={"quality": tuple(quality)})


def default_quality_contexts(longest: int) -> tuple[int, ...]:
    """The context, and a shorter one if it is long enough."""
    return tuple(n for n in dict.fromkeys((min(2048, longest // 2), longest)) if n >= LEAST_QUALITY)


class Calibration:
    """What documents say about a model, from which `plan` makes plans of any budget.

    weights: scorer weights, float32 [layers, KV heads, features]. importance: of sampled keys, float32 [layers, KV heads,
    samples]. Both are None for methods without top-k keys, which have errors: squared errors of candidate patterns, float32
    [layers, KV heads, options] (policies.py). least: the budget of the smallest plan.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: Context,
        method: Method | None = None,
        domains: Sequence[Domain] = corpus.DOMAINS,
        seed: int = 0,
        checkpoint: Path | None = None,
        progress: bool = True,
    ):
        self.shape = describe(model)
        check_plannable(self.shape)
        self.shape.refuse("calibrate", "chunked_attention")
        self.model, self.method, self.seed, self.progress = model, method or Method(), seed, progress
        rank_heads(self.shape.kv_heads, self.method.ranks)  # raises if they cannot be split
        self.scorer = find_scorer(self.method.scorer)
        self.domains = check_domains(domains)
        self.shortest, self.longest = (context, context) if isinstance(context, int) else context
        check_context(self.shortest, self.longest, self.shape.max_context)
        self.planned = list(self.shape.planned)
        if not any(self.planned):
            raise HeadsinkError("every layer of this model has a sliding window: there is nothing to plan")
        self.documents = _documents(tokenizer, self.shortest, self.longest, self.domains, seed)
        self.prompt = prompt_tokens(tokenizer)
        self.settings = {
            "context": [self.shortest, self.longest],
            "domains": list(self.domains),
            "seed": seed,
            "method": asdict(self.method),
        }
        self.checkpoint = Checkpoint(checkpoint, self.settings | _identity(model))
        options = (smallest(0),) if self.method.allocates else candidates(self.method, self.shortest)
        self.least = min(pattern.size(self.shortest) for pattern in options) / self.shortest
        self._read()

    def _read(self) -> None:
        """Measure the documents, one at a time. Cached documents are kept for coordinate descent only."""
        few = self.method.allocates and sum(self.planned) * self.shape.kv_heads <= FEW
        options = candidates(self.method, self.shortest)
        fit, importance = ScorerFit(self.shape, self.scorer), []
        self.errors = torch.zeros(self.shape.layers, self.shape.kv_heads, len(options))
        self.cached: list[CachedDocument] = []
        self.full: list[FullCacheScores] = []  # of the documents on which plans are verified
        with bar("reading", len(self.documents), self.progress) as shown:
            for number, document in enumerate(self.documents):
                cached = CachedDocument(self.model, document)
                if number < self._verified:
                    self.full.append(cached.full)
                if self.method.allocates:
                    measured = measure_importance(cached, self.prompt, whole=few)
                    fit.add(cached, measured.without_lead())
                    importance.append(measured.without_lead().attention)
                    if few:
                        cached.set_importance(measured)
                        self.cached.append(cached)
                elif needs_errors(self.method):
                    self.errors += cached.squared_errors(options) / len(self.documents)
                shown.advance(shown.task_ids[0])
        self.weights = fit.weights() if self.method.allocates else None
        self.importance = torch.cat(importance, -1) if self.method.allocates else None

    @property
    def _verified(self) -> int:
        """The number of documents on which a plan is verified: all, or the first ones if they are long."""
        return max(1, sum(tokens <= VERIFIED for tokens in accumulate(len(one.ids) for one in self.documents)))

    def plan(self, budget: float) -> Plan:
        """The plan for a budget, verified on its own cache; without quality on held-out text."""
        check_budget(budget)
        if self.least > budget:
            raise HeadsinkError(
                f"budget: {budget} of {self.shortest} tokens is less than the smallest plan, {self.least:.3f}"
            )
        if self.method.allocates:
            patterns = self._patterns(self._allocate(budget), budget)
        else:
            patterns = choose_patterns(self.method, self.planned, self.errors, self.shortest, budget, self.seed)
        plan = Plan.of(
            self.model,
            patterns,
            self.weights,
            positions=self.method.positions,
            scorer=self.method.scorer,
            reconstruction_prompt=self.prompt,
        )
        plan = plan.with_decode_window() if plan.has_top_k else plan
        with bar("verifying", len(self.full), self.progress) as shown:
            verified = verify(self.model, plan, self.full, shown)
        made = {
            "budget": budget,
            **self.settings,
            "kept": round(plan.kv_budget(self.shortest), 4),
            "dtype": dtype_name(self.model.dtype),
            "documents": [
                {"text": kind, "tokens": len(one.ids), "verified": number < len(self.full)}
                for number, ((kind, _), one) in enumerate(zip(_kinds(self.domains), self.documents, strict=True))
            ],
            "forms": list(documents.FORMS["calibration"]),
            "verified": verified,
            "criterion": None,
            "next_smaller": None,
        }
        return plan.model_copy(update={"calibration": made})

    def plan_within(self, max_kl: float) -> Plan:
        """The plan of the smallest budget of `BUDGETS` whose KL on the text of the calibration documents is at most `max_kl`."""
        return self._smallest({"max_kl": max_kl}, lambda verified: verified["kl_text"] <= max_kl)

    def plan_without_loss(self) -> Plan:
        """The plan of the smallest budget of `BUDGETS` without visible loss on the calibration documents (`is_lossless`)."""
        return self._smallest({"delta_nll": VISIBLE, "answers": "all"}, is_lossless)

    def _smallest(self, criterion: dict[str, Any], accept: Callable[[dict[str, Any]], bool]) -> Plan:
        """Bisect `BUDGETS`. The next smaller budget fails, or is below the smallest plan; budget 1 needs no proof."""
        budgets = [budget for budget in BUDGETS if budget >= self.least]
        low, high, plans = 0, len(budgets) - 1, {}
        while low < high:
            middle = (low + high) // 2
            plans[middle] = self.plan(budgets[middle])
            if accept(plans[middle].calibration["verified"]):
                high = middle
            else:
                low = middle + 1
        plan = plans[high] if high in plans else self.plan(budgets[high])
        smaller = {"budget": budgets[high - 1]} | plans[high - 1].calibration["verified"] if high else None
        found = plan.calibration | {"criterion": criterion, "next_smaller": smaller}
        return plan.model_copy(update={"calibration": found})

    def _allocate(self, budget: float) -> Tensor:
        """Head budgets by importance, then by coordinate descent if there are few heads (allocation.py): float64 [heads]."""
        assert self.importance is not None
        least = smallest(int(budget * self.shortest)).size(self.shortest) / self.shortest
        share = budget - least if budget < 1 else 1.0
        shares = allocate(self.importance[self.planned], share, FLOOR / self.shortest).flatten()
        if budget == 1 or not self.method.importance:
            return torch.full_like(shares, share)
        return self._descend(shares, budget) if self.cached else shares

    def _patterns(self, shares: Tensor, budget: float) -> list[list[Pattern] | None]:
        """The patterns of head budgets, float64 [heads]: shares of the context that are top-k keys."""
        least, rest = smallest(int(budget * self.shortest)), iter(shares.tolist())

        def pattern() -> Pattern:
            result = replace(least, top_k=int(next(rest) * self.shortest + 1e-6))
            return result if result.size(self.shortest) < self.shortest else FULL

        return [[pattern() for _ in range(self.shape.kv_heads)] if own else None for own in self.planned]

    def _descend(self, shares: Tensor, budget: float) -> Tensor:
        """Coordinate descent on the loss of the cached documents, from the checkpoint's last step if there is one."""
        last = self.checkpoint.step(budget)
        if last is not None:
            shares = torch.tensor(last.shares, dtype=torch.float64)
        if last is not None and last.done:
            return shares

        @cache  # trials of a head with few keys often give the same patterns
        def measured(patterns: tuple[tuple[Pattern, ...] | None, ...]) -> float:
            return mean_loss(self.cached, patterns)

        def loss(trial: Tensor) -> float:
            return measured(tuple(None if row is None else tuple(row) for row in self._patterns(trial, budget)))

        def save(reached: Tensor, lowest: float, done: bool = False) -> None:
            self.checkpoint.save(budget, Step(reached.tolist(), lowest, done))

        with bar("tuning", SWEEPS * len(shares), self.progress) as shown:

            def report(reached: Tensor, lowest: float) -> None:
                save(reached, lowest)
                shown.update(shown.task_ids[0], advance=1, description=f"tuning: loss {lowest:.4f}")

            shares = coordinate_descent(shares, loss, report)
        save(shares, loss(shares), done=True)
        return shares


def _kinds(domains: Sequence[Domain]) -> list[tuple[Domain, int]]:
    """The kind of text of each document and its number within the kind: the kinds in turn, at least four documents."""
    return [(domains[n % len(domains)], n // len(domains)) for n in range(max(DOCUMENTS, len(domains)))]


def _documents(
    tokenizer: PreTrainedTokenizerBase, shortest: int, longest: int, domains: Sequence[Domain], seed: int
) -> list[Document]:
    """Documents that fit into the context with their continuations, at both ends of a range in turn."""
    return [
        documents.document(
            tokenizer, length - TAIL, split="calibration", seed=seed + n, domains=(kind,), continuation=CONTINUATION
        )
        for (kind, n), length in zip(_kinds(domains), cycle((longest, shortest)), strict=False)
    ]


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    return {"model": Fingerprint.of(model).weights, "dtype": dtype_name(model.dtype), "headsink": version("headsink")}
