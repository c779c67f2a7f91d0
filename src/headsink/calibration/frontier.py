"""Quality frontier: plans of several KV budgets for one model, and the smallest budget without a large loss of quality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.calibration.calibrate import Calibration, Context
from headsink.calibration.method import Method
from headsink.data import corpus
from headsink.data.corpus import Domain
from headsink.errors import HeadsinkError
from headsink.evaluation.options import FRONTIER, FRONTIER_BUDGETS, check_budget
from headsink.evaluation.quality import measure_each
from headsink.plan.plan import Plan
from headsink.plan.schema import Quality

SOUND_KL = 0.1  # nats per token: on SmolLM2 about nine of ten most likely tokens stay the same
SOUND_ANSWERS = 0.9  # retrieval accuracy relative to the full cache


@dataclass(frozen=True)
class Frontier:
    """Plans by increasing budget, each with its quality on held-out text at the same context."""

    plans: tuple[Plan, ...]

    def least_sound(self) -> Plan | None:
        """The plan of the smallest budget for which it and all larger ones are sound; None if the largest is not.

        Sound: KL of text at most 0.1 nats per token, and retrieval accuracy at least 90 % of the full cache's.
        """
        least = None
        for plan in reversed(self.plans):
            if not is_sound(plan.quality[-1]):
                break
            least = plan
        return least

    def advice(self) -> str:
        """A recommendation in one sentence."""
        least = self.least_sound()
        if least is None:
            return "Use a larger budget than these: even the largest of them loses too much quality on this model."
        return (
            f"Do not go below {least.calibration['budget']:.0%} for this model at {least.quality[-1].context} tokens."
        )

    def to_dict(self) -> dict[str, Any]:
        least = self.least_sound()
        return {
            "advice": self.advice(),
            "least_sound_budget": None if least is None else least.calibration["budget"],
            "points": [
                {"budget": plan.calibration["budget"], "kept": plan.calibration["kept"], "patterns": plan.counts()}
                | plan.quality[-1].model_dump(mode="json")
                for plan in self.plans
            ],
        }

    def write(self, folder: Path) -> None:
        """Write frontier.json and every plan to an existing folder."""
        for plan in self.plans:
            plan.save(folder / f"plan-{1000 * plan.calibration['budget']:04.0f}.json")  # budget in thousandths
        (folder / FRONTIER).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")


def is_sound(quality: Quality) -> bool:
    return quality.kl <= SOUND_KL and quality.right_plan >= SOUND_ANSWERS * quality.right_full


def frontier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: Context,
    budgets: Sequence[float] = FRONTIER_BUDGETS,
    method: Method | None = None,
    domains: Sequence[Domain] = corpus.DOMAINS,
    seed: int = 0,
    progress: bool = True,
) -> Frontier:
    """Plans for several budgets and their quality at `context`. Documents are prefilled once; see `headsink.calibrate`.

    Budgets that are below the smallest plan are left out; raises HeadsinkError if all are.
    """
    for budget in budgets:
        check_budget(budget)
    calibration = Calibration(
        model, tokenizer, context=context, method=method, domains=domains, seed=seed, progress=progress
    )
    possible = [budget for budget in sorted(budgets) if budget >= calibration.least]
    if not possible:
        raise HeadsinkError(f"budgets: all are less than the smallest plan, {calibration.least:.3f}")
    plans = [calibration.plan(budget) for budget in possible]
    measured = measure_each(model, tokenizer, plans, calibration.longest, seed=seed, progress=progress)
    pairs = zip(plans, measured, strict=True)
    return Frontier(tuple(plan.model_copy(update={"quality": (quality,)}) for plan, quality in pairs))
