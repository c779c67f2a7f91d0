"""Calibrate a plan: prefill documents, search for patterns under a budget, verify the plan on its cache, measure its quality.

Documents from the calibration half of the corpus, ordinary text with needles, are prefilled once at the context that the plan is
for (cached_document.py). The search (search.py) evaluates patterns on teacher-forced continuations of these documents. Then the
plan runs on its own cache over the same documents, and over held-out documents (evaluation/quality.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, cached_property
from importlib.metadata import version
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.calibration.allocation import FEW, SWEEPS, Allocation, allocate, coordinate_descent
from headsink.calibration.cached_document import CachedDocument
from headsink.calibration.method import SINK, Method
from headsink.calibration.score_fit import ImportanceScores, fit, measure_importance
from headsink.calibration.search import Phase, Search, Step, check_room, mean_loss
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
from headsink.runtime.scoring import continuation_log_probs, read
from headsink.utils.files import check_file, write_text
from headsink.utils.progress import bar

DOCUMENTS = len(corpus.DOMAINS)  # least number of calibration documents
CONTINUATION = 128  # tokens of the continuation of a document
VERIFIED = 8_000  # tokens of documents on which the finished plan is verified, at least one document
BUDGETS = (0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)  # candidates of --max-kl

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
    """Calibrate a plan that keeps at most `budget` of the KV entries at `context` tokens, or as few as `max_kl` allows.

    Parameters
    ----------
    budget : fraction of the full KV cache that is kept, over layers without a sliding window; above 0, at most 1.
    max_kl : instead of a budget: largest KL(full || plan) on the text of the calibration documents, in nats per token. Takes a
        budget of `BUDGETS` that satisfies it while the next smaller one does not.
    context : context of the plan in tokens. With a range (shortest, longest) the budget holds at the shortest context, and so at
        all of them, since windows are constant; errors are measured at both ends.
    method : how patterns are chosen; the default is headsink's. Others, such as `Method(policy="streaming-llm")`, are baselines.
    quality_contexts : contexts in tokens at which quality is measured on held-out text; by default `context` and a shorter one,
        () for none.
    domains : kinds of text of the calibration documents, used in turn; there are at least four documents.
    checkpoint : a file with the finished steps; an interrupted search continues from it, given the same arguments.
    progress : show progress bars on standard error.

    Returns
    -------
    Plan, with its measured quality.

    Raises HeadsinkError for invalid or contradictory arguments and for models without a layer to plan.
    """
    if (budget is None) == (max_kl is None):
        raise HeadsinkError("budget: give a budget or max_kl, one of the two")
    if budget is not None:
        check_budget(budget)
    if max_kl is not None:
        check_max_kl(max_kl)
    if checkpoint is not None:
        check_file(checkpoint, force=True)  # the next line checks its contents
        _read_checkpoint(checkpoint, {})
    most = describe(model).max_context
    check_quality(quality_contexts or (), most)
    longest = context if isinstance(context, int) else context[1]
    if progress and longest <= most:
        timing.print_estimate("plan", model, longest, timing.PLAN)
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
    plan = calibration.plan(budget) if budget is not None else calibration.plan_within(max_kl or 0.0)
    if quality_contexts is None:
        quality_contexts = default_quality_contexts(calibration.longest)
    quality = [measure(model, tokenizer, plan, n, seed=seed, progress=progress) for n in quality_contexts]
    return plan.model_copy(update={"quality": tuple(quality)})


def default_quality_contexts(longest: int) -> tuple[int, ...]:
    """The context, and a shorter one if it is long enough."""
    return tuple(n for n in dict.fromkeys((min(2048, longest // 2), longest)) if n >= LEAST_QUALITY)


class Calibration:
    """Prefilled documents and scorer weights, from which `plan` makes plans of any budget."""

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
        shape = describe(model)
        check_plannable(shape)
        self.model, self.method, self.seed = model, method or Method(), seed
        rank_heads(shape.kv_heads, self.method.ranks)  # raises if they cannot be split
        self.scorer = find_scorer(self.method.scorer)
        self.checkpoint, self.progress = checkpoint, progress
        self.domains = check_domains(domains)
        self.shortest, self.longest = (context, context) if isinstance(context, int) else context
        check_context(self.shortest, self.longest, shape.max_context)
        if all(shape.windows):
            raise HeadsinkError("every layer of this model has a sliding window: there is nothing to plan")
        self.documents = _documents(tokenizer, self.shortest, self.longest, self.domains, seed)
        self.prompt = prompt_tokens(tokenizer)
        self.cached: list[CachedDocument] = []
        demands = []
        with bar("reading", 2 * len(self.documents), progress) as shown:
            for document in self.documents:
                self.cached.append(CachedDocument(model, document, self.method.prefill_compression))
                shown.advance(shown.task_ids[0])
                demands.append(measure_importance(self.cached[-1], self.prompt))
                shown.advance(shown.task_ids[0])
        self.weights = fit(self.cached, demands, self.scorer)
        self.importance = torch.cat([one.attention for one in demands], -1)
        for cached in self.cached:
            cached.set_scores(self.weights, self.scorer)

    def plan(self, budget: float) -> Plan:
        """The plan for a budget, verified once on its own cache; without quality on held-out text."""
        check_budget(budget)
        key = {
            "budget": budget,
            "context": [self.shortest, self.longest],
            "domains": list(self.domains),
            "seed": self.seed,
            "method": asdict(self.method),
        }
        search = key | _identity(self.model)
        if self.method.reconstruct:
            patterns, replayed = self._allocate(budget, search), None
        else:
            last = self._search(budget, search)
            patterns, replayed = last.plan(), round(last.loss, 5)
        options: dict[str, Any] = {
            "prefill_compression": self.method.prefill_compression,
            "positions": self.method.positions,
            "scorer": self.method.scorer,
        }
        if self.method.reconstruct:
            options |= {"reconstruction_prompt": self.prompt, "refit_values": self.method.refit_values}
        plan = Plan.of(self.model, patterns, self.weights, **options)
        kl = self._verify(plan)
        loss = float(kl[0] + self.method.retrieval_weight * kl[1])
        made = key | {
            "kept": round(plan.kv_budget(self.shortest), 4),
            "dtype": dtype_name(self.model.dtype),
            "documents": [
                {"text": kind, "tokens": len(one.document.ids), "verified": one in self._verified}
                for (kind, _), one in zip(_kinds(self.domains), self.cached, strict=True)
            ],
            "forms": list(documents.FORMS["calibration"]),
            "search_loss": replayed,
            "verified": {
                "loss": round(loss, 5),
                "kl_text": round(float(kl[0]), 5),
                "kl_answers": round(float(kl[1]), 5),
            },
        }
        return plan.model_copy(update={"calibration": made})

    def plan_within(self, max_kl: float) -> Plan:
        """A plan whose KL on the text of the calibration documents is at most `max_kl`, by bisection of `BUDGETS`.

        The next smaller budget exceeds it, or is below the smallest plan.
        """
        budgets = [budget for budget in BUDGETS if budget >= self.least]
        low, high, best = 0, len(budgets) - 1, None
        while low < high:
            middle = (low + high) // 2
            plan = self.plan(budgets[middle])
            if plan.calibration["verified"]["kl_text"] <= max_kl:
                high, best = middle, plan
            else:
                low = middle + 1
        plan = best if best is not None else self.plan(budgets[high])
        return plan.model_copy(update={"calibration": plan.calibration | {"max_kl": max_kl}})

    @property
    def least(self) -> float:
        """The budget of the smallest plan."""
        return min(pattern.size(self.shortest) for pattern in self.method.options(self.shortest)) / self.shortest

    @property
    def _verified(self) -> list[CachedDocument]:
        """The documents on which a plan is verified: all, or the first ones if they are long, since verifying takes longest."""
        tokens = accumulate(len(cached.document.ids) for cached in self.cached)
        return [one for one, so_far in zip(self.cached, tokens, strict=True) if so_far <= VERIFIED] or self.cached[:1]

    def _verify(self, plan: Plan) -> torch.Tensor:
        """KL of the text and of the answers under the plan on its own cache, mean over documents: float32 [2]."""
        total = torch.zeros(2)
        with bar("verifying", len(self._verified), self.progress) as shown:
            for cached in self._verified:
                kl = cached.divergences(_log_probs(self.model, plan, cached.document))
                answers = kl[1:].mean() if len(kl) > 1 else kl.new_zeros(())
                total += torch.stack([kl[0], answers]).cpu() / len(self._verified)
                shown.advance(shown.task_ids[0])
        return total

    def _allocate(self, budget: float, key: dict[str, Any]) -> list[list[Pattern] | None]:
        """Patterns for context reconstruction: top-k keys by importance, then coordinate descent over top-k keys and windows if
        there are few heads (allocation.py)."""
        check_room(budget, self.shortest, self.least)
        layers = [layer for layer, slides in enumerate(self.cached[0].shape.windows) if slides is None]
        share = budget - self.least if budget < 1 else 1.0
        shares = allocate(self.importance[layers], share).flatten()
        if budget == 1 or not self.method.importance:
            shares = torch.full_like(shares, share)
        allocation = Allocation(shares, torch.zeros_like(shares))
        if budget < 1 and self.method.refine and len(shares) <= FEW:
            allocation = self._refine(allocation, key)
        return self._patterns(allocation)

    def _patterns(self, allocation: Allocation) -> list[list[Pattern] | None]:
        window, shape = self.method.windows[0], self.cached[0].shape
        rest = iter(zip(allocation.shares.tolist(), allocation.recent.tolist(), strict=True))

        def pattern() -> Pattern:
            share, recent = next(rest)
            keys = int(share * self.shortest + 1e-6)
            result = Pattern(SINK, keys - round(keys * recent), window + round(keys * recent))
            return result if result.size(self.shortest) < self.shortest else FULL

        return [None if slides else [pattern() for _ in range(shape.kv_heads)] for slides in shape.windows]

    def _refine(self, allocation: Allocation, key: dict[str, Any]) -> Allocation:
        """Coordinate descent on the loss of the cached documents, with its steps in the checkpoint."""
        done = self._done(key)
        if done:
            allocation = self._restore(done[-1])
        if done and done[-1].phase == "done":
            return allocation
        for cached, importance in zip(self.cached, self._importance, strict=True):
            cached.set_importance(importance)

        @cache  # trials of a head with few keys often give the same patterns
        def measured(patterns: tuple[tuple[Pattern, ...] | None, ...]) -> float:
            return mean_loss(self.cached, patterns, self.method.retrieval_weight)

        def loss(trial: Allocation) -> float:
            return measured(tuple(None if row is None else tuple(row) for row in self._patterns(trial)))

        def step(reached: Allocation, lowest: float, phase: Phase) -> None:
            kept = float(reached.shares.mean()) + self.least
            done.append(Step.of(self._patterns(reached), kept, lowest, phase))
            self._save(key, done)

        with bar("tuning", SWEEPS * len(allocation.shares), self.progress) as shown:

            def report(reached: Allocation, lowest: float) -> None:
                step(reached, lowest, "refined")
                shown.update(shown.task_ids[0], advance=1, description=f"tuning: loss {lowest:.4f}")

            allocation = coordinate_descent(allocation, loss, report)
        step(allocation, done[-1].loss, "done")
        for cached in self.cached:  # for other budgets
            cached.set_scores(self.weights, self.scorer)
        return allocation

    def _restore(self, step: Step) -> Allocation:
        """The allocation of a step in the checkpoint."""
        patterns = [p for row in step.plan() if row is not None for p in row]
        windows = [0 if p.window is None else p.window - self.method.windows[0] for p in patterns]
        counts = [self.shortest if p.full else p.top_k + window for p, window in zip(patterns, windows, strict=True)]
        shares = torch.tensor(counts, dtype=torch.float64) / self.shortest
        recent = [window / max(keys, 1) for window, keys in zip(windows, counts, strict=True)]
        return Allocation(shares.clamp(max=1 - self.least), torch.tensor(recent, dtype=torch.float64))

    @cached_property
    def _importance(self) -> list[ImportanceScores]:
        """Importance scores of all keys of each document."""
        return [measure_importance(cached, self.prompt, whole=True) for cached in self.cached]

    def _search(self, budget: float, key: dict[str, Any]) -> Step:
        """Run the search, with its steps in the checkpoint."""
        search = Search(self.cached, self.shortest, self.method, self.seed, self.importance)
        done = self._done(key)
        with bar("searching", 100, self.progress) as shown:

            def report(step: Step) -> None:
                share = {"forward": 85 * (step.kept / budget) ** 2, "refined": 90, "done": 100}[step.phase]
                text = f"searching: keeps {step.kept:.1%}, loss {step.loss:.4f}"
                shown.update(shown.task_ids[0], completed=share, description=text)
                done.append(step)
                self._save(key, done)

            return search.run(budget, tuple(done), report)

    def _done(self, key: dict[str, Any]) -> list[Step]:
        return [] if self.checkpoint is None else _read_checkpoint(self.checkpoint, key)

    def _save(self, key: dict[str, Any], steps: Sequence[Step]) -> None:
        if self.checkpoint is not None:
            write_text(self.checkpoint, json.dumps({"key": key, "steps": [asdict(step) for step in steps]}))


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


def _log_probs(model: PreTrainedModel, plan: Plan, document: Document) -> torch.Tensor:
    """Log-probabilities of all scored tokens of a document under the plan: float32 [scored tokens, vocabulary]."""
    cache = read(model, plan, document.ids)
    return torch.cat([continuation_log_probs(model, cache, ids, scored) for _, ids, scored in document.continuations])


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    return {"model": Fingerprint.of(model).weights, "dtype": dtype_name(model.dtype), "headsink": version("headsink")}


def _read_checkpoint(path: Path, key: dict[str, Any]) -> list[Step]:
    """The steps of an interrupted run with the same arguments; [] if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        steps = [Step(**step) for step in content["steps"]] if content["key"] == json.loads(json.dumps(key)) else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HeadsinkError(f"{path}: not a checkpoint of headsink; remove it") from error
    check_file(path)  # it will be replaced
    return steps
