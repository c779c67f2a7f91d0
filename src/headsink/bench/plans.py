"""Plans of several budgets for a benchmark, kept in files: those that come with the package, and calibrated ones otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.calibration.calibrate import Calibration
from headsink.errors import HeadsinkError
from headsink.models.devices import dtype_name
from headsink.plan.packaged import packaged_plan
from headsink.plan.plan import Plan


def plans_of_budgets(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[float, Path],
    *,
    context: int,
    seed: int,
    checkpoint: Path,
) -> dict[float, Plan]:
    """Return a plan for each budget and write it to the budget's file.

    A packaged plan is taken where there is one for the model and the budget. Any other is read from its file if it was calibrated
    with the same settings, or else calibrated.

    Parameters
    ----------
    name : of the model, as for `headsink.load`.
    files : a file for each KV budget.
    context : tokens of prompt and answer together; packaged plans are scaled to it.
    seed : of the calibration's documents.
    checkpoint : as for `calibrate`; it is removed when a plan is made.
    """
    plans = packaged_plans(name, files, context)
    calibration = None
    for budget, file in files.items():
        if budget in plans:
            plans[budget].save(file)
            continue
        wanted = {"budget": budget, "context": [context] * 2, "seed": seed, "dtype": dtype_name(model.dtype)}
        plan = Plan.load(file) if file.is_file() else None
        if plan is None or any(plan.calibration.get(key) != value for key, value in wanted.items()):
            if calibration is None:  # documents are read once for all budgets
                calibration = Calibration(model, tokenizer, context=context, seed=seed, checkpoint=checkpoint)
            plan = calibration.plan(budget)
            plan.save(file)
            checkpoint.unlink(missing_ok=True)
        plans[budget] = plan
    return {budget: plans[budget] for budget in files}


def packaged_plans(name: str, budgets: Iterable[float], context: int) -> dict[float, Plan]:
    """Return the plans that come with the package for a model, scaled to `context` tokens, by those budgets that have one."""
    found = {budget: _packaged(name, budget, context) for budget in budgets}
    return {budget: plan for budget, plan in found.items() if plan is not None}


@cache
def _packaged(name: str, budget: float, context: int) -> Plan | None:
    try:
        return packaged_plan(name, budget, context)
    except HeadsinkError:  # says which models and budgets are packaged
        return None
