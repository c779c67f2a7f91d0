"""The columns of a suite: the full cache, every plan with and without reconstruction, and presses at the plans' budgets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.bench.longcontext.engines import Engine, HeadsinkEngine, KvpressEngine, fit
from headsink.bench.longcontext.run import FULL
from headsink.bench.peers.process import Process
from headsink.bench.plans import calibrate_plans
from headsink.cache.cache import KVDtype
from headsink.errors import HeadsinkError
from headsink.plan.packaged import packaged_contexts, packaged_plan
from headsink.plan.plan import Plan


def plans_of_budgets(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budgets: Iterable[float],
    *,
    length: int,
    seed: int,
    folder: Path,
) -> dict[str, Plan]:
    """Return a plan of each budget for `length` tokens: packaged, or else calibrated and kept in `folder`.

    name: of the model, as for `headsink.load`.
    """
    packaged = {budget: packaged_plan(name, budget, length) for budget in budgets if _is_packaged(name, budget)}
    files = {budget: folder / f"{length}-{budget:g}-{seed}.json" for budget in budgets if budget not in packaged}
    checkpoint = folder / "calibration.partial"
    made = calibrate_plans(model, tokenizer, files, context=length, seed=seed, checkpoint=checkpoint)
    return {f"{budget:g}": packaged.get(budget) or made[budget] for budget in budgets}


def _is_packaged(name: str, budget: float) -> bool:
    try:
        return bool(packaged_contexts(name, budget))
    except HeadsinkError:  # says which budgets and models are
        return False


def engines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: dict[str, Plan],
    length: int,
    *,
    kv_dtype: KVDtype,
    kvpress: Process | None,
    presses: Iterable[str],
) -> list[Engine]:
    """Return an engine for each column at a length in tokens."""
    columns: list[Engine] = [HeadsinkEngine(FULL, model, tokenizer, Plan.full(model))]
    for name, plan in plans.items():
        columns.append(HeadsinkEngine(name, model, tokenizer, plan, kv_dtype=kv_dtype))
        columns.append(HeadsinkEngine(f"{name}, reconstruction", model, tokenizer, plan, True, kv_dtype))
    if kvpress is not None:
        for name, plan in plans.items():
            budget = round(fit(plan, length).kv_budget(length), 4)
            columns += [KvpressEngine(f"{press} {name}", kvpress, press, budget) for press in presses]
    return columns
