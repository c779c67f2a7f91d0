"""Plans of several budgets that a benchmark makes, kept in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.calibration.calibrate import Calibration
from headsink.models.devices import dtype_name
from headsink.plan.plan import Plan


def calibrate_plans(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[float, Path],
    *,
    context: int,
    seed: int,
    checkpoint: Path,
) -> dict[float, Plan]:
    """Return a plan for each budget, from its file if it was made with the same settings; others are made and saved there.

    checkpoint: as for `calibrate`; it is removed when a plan is made.
    """
    calibration, plans = None, {}
    for budget, file in files.items():
        wanted = {"budget": budget, "context": [context] * 2, "seed": seed, "dtype": dtype_name(model.dtype)}
        plan = Plan.load(file) if file.is_file() else None
        if plan is None or any(plan.calibration.get(key) != value for key, value in wanted.items()):
            if calibration is None:  # documents are read once for all budgets
                calibration = Calibration(model, tokenizer, context=context, seed=seed, checkpoint=checkpoint)
            plan = calibration.plan(budget)
            plan.save(file)
            checkpoint.unlink(missing_ok=True)
        plans[budget] = plan
    return plans
