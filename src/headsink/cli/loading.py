"""What `generate` and `chat` do before the model answers: load it with its plan, and compile the decode step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import headsink
from headsink.utils.terminal import err

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headsink.attention.formats import KVDtype
    from headsink.plan.plan import Plan


def load_with_plan(
    model: str, plan_file: Path | None, other_weights: bool, *, dtype: str | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Plan | None]:
    """A model, its tokenizer and the plan of a file, if one is given. The plan is read first, which takes no time."""
    plan = headsink.Plan.load(plan_file) if plan_file else None
    loaded, tokenizer = headsink.load(model, dtype=dtype, device=device)
    return loaded, tokenizer, plan.for_model(loaded) if plan is not None and other_weights else plan


def compile_step(model: PreTrainedModel, plan: Plan | None, kv_dtype: KVDtype = "auto") -> None:
    """Compile the decode step, which runs under a plan or with a cache of another dtype, before the clock starts."""
    from headsink.decoding.step import prepare, refusal

    if plan is not None or kv_dtype != "auto":
        # `refusal` compares the step with the model, which compiles most of it
        with err.status("compiling: about a minute, once on a machine"):
            if refusal(model, plan) is None:
                prepare(model, kv_dtype)
