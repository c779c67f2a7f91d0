"""Make a plan: read documents, search for patterns under a budget, run the result as it will be used, measure what it costs.

Documents of the calibration half, ordinary text with facts strewn in, are read once at the context that the plan is for
(replay.py); the search (search.py) tries patterns on what follows them. Then the plan runs through its own cache over the same
documents, which the search did not do, and over documents that calibration never saw (quality.py).
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
from headsink.calibration.method import SINK, Method
from headsink.calibration.replay import Replay
from headsink.calibration.score_fit import Demand, demand, fit
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
from headsink.models import timing
from headsink.models.devices import dtype_name
from headsink.models.distributed import rank_heads
from headsink.models.fingerprint import Fingerprint
from headsink.models.spec import check_plannable, describe
from headsink.plan.plan import Plan
from headsink.runtime.scoring import branch_log_probs, read
from headsink.utils.files import check_file, write_text
from headsink.utils.progress import bar

DOCUMENTS = len(corpus.DOMAINS)  # at least
CONTINUATION = 128  # tokens of text after a document
VERIFIED = 8_000  # tokens of documents that a plan is run over once it is made, at least one document
BUDGETS = (0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)  # that --max-kl chooses from

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
    """Make a plan that keeps at most `budget` of the KV entries at `context` tokens, or as few as `max_kl` allows.

    Parameters
    ----------
    budget : fraction of the full KV cache, over the heads that do not slide by themselves; above 0, at most 1.
    max_kl : instead of a budget: KL(full || plan) of text, in nats per token, that is not to be exceeded on the calibration
        documents. One of `BUDGETS` that holds it is taken, of which the next smaller one does not.
    context : tokens of context that the plan is for. Of a range (shortest, longest) the budget holds at the shortest, and so
        at all of them, since windows are constant; errors are measured at both ends.
    method : how patterns are chosen; ours if not given. `Method(policy="streaming-llm")` and others are there to compare with.
    quality_contexts : lengths at which the plan is measured on held-out text; the context and a shorter one if not given, ()
        to leave that out.
    domains : kinds of text that the calibration documents are made of, of `KINDS`; four documents at least, in turn.
    checkpoint : a file that keeps the steps done; an interrupted search goes on from there, given the same arguments.
    progress : show bars on standard error.

    Returns
    -------
    Plan, with its measured quality.
    """
    if (budget is None) == (max_kl is None):
        raise HeadsinkError("budget: give a budget or max_kl, one of the two")
    if budget is not None:
        check_budget(budget)
    if max_kl is not None:
        check_max_kl(max_kl)
    if checkpoint is not None:
        check_file(checkpoint, force=True)  # what is in it, the next line checks
        _read_checkpoint(checkpoint, {})
    most = describe(model).max_context
    check_quality(quality_contexts or (), most)
    longest = context if isinstance(context, int) else context[1]
    if progress and longest <= most:
        timing.tell("plan", model, longest, timing.PLAN)
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
    """The context, and a shorter one if there is room for it."""
    return tuple(n for n in dict.fromkeys((min(2048, longest // 2), longest)) if n >= LEAST_QUALITY)


class Calibration:
    """Documents that the model has read, from which plans of any budget are made."""

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
        self.checkpoint, self.progress = checkpoint, progress
        self.domains = check_domains(domains)
        self.shortest, self.longest = (context, context) if isinstance(context, int) else context
        check_context(self.shortest, self.longest, shape.max_context)
        if all(shape.windows):
            raise HeadsinkError("every layer of this model slides by itself: there is nothing to plan")
        self.documents = _documents(tokenizer, self.shortest, self.longest, self.domains, seed)
        self.prompt = prompt_tokens(tokenizer)
        self.replays: list[Replay] = []
        told = []
        with bar("reading", 2 * len(self.documents), progress) as shown:
            for document in self.documents:
                self.replays.append(Replay(model, document, self.method.prefill_compression))
                shown.advance(shown.task_ids[0])
                told.append(demand(self.replays[-1], self.prompt))
                shown.advance(shown.task_ids[0])
        self.weights = fit(self.replays, told)
        self.need = torch.cat([one.attention for one in told], -1)
        for replay in self.replays:
            replay.set_scores(self.weights)

    def plan(self, budget: float) -> Plan:
        """The plan for a budget, run once as it will be used; without quality on held-out text."""
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
            patterns, replayed = self._dealt(budget, search), None
        else:
            last = self._search(budget, search)
            patterns, replayed = last.plan(), round(last.loss, 5)
        ways: dict[str, Any] = {
            "prefill_compression": self.method.prefill_compression,
            "positions": self.method.positions,
        }
        if self.method.reconstruct:
            ways |= {"reconstruction_prompt": self.prompt, "refit_values": self.method.refit_values}
        plan = Plan.of(self.model, patterns, self.weights, **ways)
        kl = self._verify(plan)
        loss = float(kl[0] + self.method.retrieval_weight * kl[1])
        made = key | {
            "kept": round(plan.kept(self.shortest), 4),
            "dtype": dtype_name(self.model.dtype),
            "documents": [
                {"text": kind, "tokens": len(one.document.ids), "verified": one in self._verified}
                for (kind, _), one in zip(_kinds(self.domains), self.replays, strict=True)
            ],
            "forms": list(documents.FORMS["calibration"]),
            "replayed_loss": replayed,
            "verified": {
                "loss": round(loss, 5),
                "kl_text": round(float(kl[0]), 5),
                "kl_answers": round(float(kl[1]), 5),
            },
        }
        return plan.model_copy(update={"calibration": made})

    def plan_within(self, max_kl: float) -> Plan:
        """A plan whose KL on the text of the calibration documents is at most `max_kl`, found by halving `BUDGETS`.

        The next smaller budget does not hold it, or is below the smallest plan.
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
    def _verified(self) -> list[Replay]:
        """The documents that a plan is run over: all, or the first of long ones, as running takes longer than all the rest."""
        tokens = accumulate(len(replay.document.ids) for replay in self.replays)
        return [one for one, so_far in zip(self.replays, tokens, strict=True) if so_far <= VERIFIED] or self.replays[:1]

    def _verify(self, plan: Plan) -> torch.Tensor:
        """KL of the text and of the answers, under the plan as it runs, mean over documents: float32 [2]."""
        total = torch.zeros(2)
        with bar("verifying", len(self._verified), self.progress) as shown:
            for replay in self._verified:
                kl = replay.divergences(_log_probs(self.model, plan, replay.document))
                answers = kl[1:].mean() if len(kl) > 1 else kl.new_zeros(())
                total += torch.stack([kl[0], answers]).cpu() / len(self._verified)
                shown.advance(shown.task_ids[0])
        return total

    def _dealt(self, budget: float, key: dict[str, Any]) -> list[list[Pattern] | None]:
        """Top-k keys by need; where heads are few, top_k and last keys by the loss (dealing.py). For contexts that are told
        again."""
        check_room(budget, self.shortest, self.least)
        layers = [layer for layer, slides in enumerate(self.replays[0].shape.windows) if slides is None]
        share = budget - self.least if budget < 1 else 1.0
        shares = allocate(self.need[layers], share).flatten()
        if budget == 1 or not self.method.need:
            shares = torch.full_like(shares, share)
        deal = Allocation(shares, torch.zeros_like(shares))
        if budget < 1 and self.method.refine and len(shares) <= FEW:
            deal = self._tuned(deal, key)
        return self._patterns(deal)

    def _patterns(self, deal: Allocation) -> list[list[Pattern] | None]:
        window, shape = self.method.windows[0], self.replays[0].shape
        rest = iter(zip(deal.shares.tolist(), deal.recent.tolist(), strict=True))

        def pattern() -> Pattern:
            share, recent = next(rest)
            keys = int(share * self.shortest + 1e-6)
            found = Pattern(SINK, keys - round(keys * recent), window + round(keys * recent))
            return found if found.size(self.shortest) < self.shortest else FULL

        return [None if slides else [pattern() for _ in range(shape.kv_heads)] for slides in shape.windows]

    def _tuned(self, deal: Allocation, key: dict[str, Any]) -> Allocation:
        """Move the numbers of heads one by one while the loss of the replays falls, keeping what is reached in the checkpoint."""
        done = self._done(key)
        if done:
            deal = self._deal(done[-1])
        if done and done[-1].phase == "done":
            return deal
        for replay, told in zip(self.replays, self._told, strict=True):
            replay.set_told(told)

        @cache  # many trials of a head with next to no keys are one
        def measured(patterns: tuple[tuple[Pattern, ...] | None, ...]) -> float:
            return mean_loss(self.replays, patterns, self.method.retrieval_weight)

        def loss(trial: Allocation) -> float:
            return measured(tuple(None if row is None else tuple(row) for row in self._patterns(trial)))

        def step(reached: Allocation, lowest: float, phase: Phase) -> None:
            kept = float(reached.shares.mean()) + self.least
            done.append(Step.of(self._patterns(reached), kept, lowest, phase))
            self._save(key, done)

        with bar("tuning", SWEEPS * len(deal.shares), self.progress) as shown:

            def report(reached: Allocation, lowest: float) -> None:
                step(reached, lowest, "refined")
                shown.update(shown.task_ids[0], advance=1, description=f"tuning: loss {lowest:.4f}")

            deal = coordinate_descent(deal, loss, report)
        step(deal, done[-1].loss, "done")
        for replay in self.replays:  # as another method or budget expects them
            replay.set_scores(self.weights)
        return deal

    def _deal(self, step: Step) -> Allocation:
        """As it was when the step was kept."""
        patterns = [p for row in step.plan() if row is not None for p in row]
        last = [0 if p.window is None else p.window - self.method.windows[0] for p in patterns]
        held = [self.shortest if p.full else p.top_k + more for p, more in zip(patterns, last, strict=True)]
        shares = torch.tensor(held, dtype=torch.float64) / self.shortest
        recent = [more / max(keys, 1) for more, keys in zip(last, held, strict=True)]
        return Allocation(shares.clamp(max=1 - self.least), torch.tensor(recent, dtype=torch.float64))

    @cached_property
    def _told(self) -> list[Demand]:
        """What telling the whole of each document again takes."""
        return [demand(replay, self.prompt, whole=True) for replay in self.replays]

    def _search(self, budget: float, key: dict[str, Any]) -> Step:
        """Run the search, keeping its steps in the checkpoint."""
        search = Search(self.replays, self.shortest, self.method, self.seed, self.need)
        done = self._done(key)
        with bar("searching", 100, self.progress) as shown:

            def report(step: Step) -> None:
                share = {"forward": 85 * (step.kept / budget) ** 2, "refined": 90, "done": 100}[step.phase]
                said = f"searching: keeps {step.kept:.1%}, loss {step.loss:.4f}"
                shown.update(shown.task_ids[0], completed=share, description=said)
                done.append(step)
                self._save(key, done)

            return search.run(budget, tuple(done), report)

    def _done(self, key: dict[str, Any]) -> list[Step]:
        return [] if self.checkpoint is None else _read_checkpoint(self.checkpoint, key)

    def _save(self, key: dict[str, Any], steps: Sequence[Step]) -> None:
        if self.checkpoint is not None:
            write_text(self.checkpoint, json.dumps({"key": key, "steps": [asdict(step) for step in steps]}))


def _kinds(domains: Sequence[Domain]) -> list[tuple[Domain, int]]:
    """The kind of text of each document, and how many of its kind come before it: the kinds in turn, four documents at least."""
    return [(domains[n % len(domains)], n // len(domains)) for n in range(max(DOCUMENTS, len(domains)))]


def _documents(
    tokenizer: PreTrainedTokenizerBase, shortest: int, longest: int, domains: Sequence[Domain], seed: int
) -> list[Document]:
    """Documents that fit the context with what follows them, at both ends of a range in turn."""
    return [
        documents.document(
            tokenizer, length - TAIL, split="calibration", seed=seed + n, domains=(kind,), continuation=CONTINUATION
        )
        for (kind, n), length in zip(_kinds(domains), cycle((longest, shortest)), strict=False)
    ]


def _log_probs(model: PreTrainedModel, plan: Plan, document: Document) -> torch.Tensor:
    """Of all scored tokens of a document's branches, run under the plan: float32 [scored tokens, vocabulary]."""
    cache = read(model, plan, document.ids)
    return torch.cat([branch_log_probs(model, cache, ids, scored) for _, ids, scored in document.branches])


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    return {"model": Fingerprint.of(model).weights, "dtype": dtype_name(model.dtype), "headsink": version("headsink")}


def _read_checkpoint(path: Path, key: dict[str, Any]) -> list[Step]:
    """The steps of an interrupted run with the same arguments; none if there was no such run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        steps = [Step(**step) for step in found["steps"]] if found["key"] == json.loads(json.dumps(key)) else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HeadsinkError(f"{path}: not a checkpoint of headsink; remove it") from error
    check_file(path)  # it will be replaced
    return steps
