"""The columns of a suite: the full cache, every plan with and without reconstruction, and presses at the plans' budgets."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.attention.formats import KVDtype
from headsink.bench.longcontext.engines import Engine, HeadsinkEngine, KvpressEngine, fit
from headsink.bench.longcontext.run import FULL
from headsink.bench.peers.process import Process
from headsink.plan.plan import Plan


def engines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: dict[str, Plan],
    length: int,
    *,
    kv_dtype: KVDtype = "auto",
    kvpress: Process | None = None,
    presses: Iterable[str] = (),
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
