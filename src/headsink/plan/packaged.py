"""Plans that come with the package, for built-in models. `benchmarks/packaged_plans.py` makes them. Does not import torch."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from headsink.errors import HeadsinkError
from headsink.models.builtin import builtin_name

if TYPE_CHECKING:
    from headsink.plan.plan import Plan

FOLDER = Path(__file__).parent / "packaged"


def packaged_plan(model: str, budget: float, context: int) -> Plan:
    """Return a packaged plan with a KV budget for texts of `context` tokens, prompt and output together.

    model: name of a built-in model. The plan whose context is nearest in ratio is used, and scaled to `context` (`Plan.scale`).
    Raises HeadsinkError if there is no packaged plan for the model or the budget, and for a context below 1.
    """
    from headsink.plan.plan import Plan

    if context < 1:
        raise HeadsinkError(f"context: {context} is below 1")
    # Heads share a budget differently at other lengths: the plan for 6,000 tokens loses facts in texts of 2,000.
    nearest = min(packaged_contexts(model, budget), key=lambda found: abs(log(found / context)))
    return Plan.load(packaged_file(model, nearest, budget)).scale(context)


def packaged_file(model: str, context: int, budget: float) -> Path:
    """The file of the packaged plan for a context in tokens and a KV budget."""
    return FOLDER / f"{builtin_name(model)}-{context}-{budget}.json"


def packaged_contexts(model: str, budget: float) -> list[int]:
    """The contexts of the packaged plans for a model and a KV budget. Raises HeadsinkError if there are none."""
    names = [path.stem.rsplit("-", 2) for path in FOLDER.glob("*.json")]
    own = [(int(context), float(kept)) for name, context, kept in names if name == builtin_name(model)]
    if not own:
        packaged = ", ".join(sorted({name for name, *_ in names}))
        raise HeadsinkError(
            f"budget: the package has plans for {packaged} only; make one for {model} with `headsink plan` and give "
            "--plan FILE"
        )
    if found := [context for context, kept in own if kept == budget]:
        return found
    raise HeadsinkError(
        f"budget: {budget} is not packaged for {model}; one of {', '.join(str(b) for b in sorted({b for _, b in own}))}, or make "
        f"a plan with `headsink plan {model} --budget {budget}` and give --plan FILE"
    )
