"""What vLLM has to be told to serve a model under a plan, and what of a plan it cannot run. Nothing here imports vLLM.

The plan itself, not the name of its file, goes into vLLM's `additional_config`: that is part of the configuration which vLLM
hands to the engine and to every worker, on this machine and on others, and of the key of its cache of compiled graphs. A
file that was changed, or an environment variable, would meet graphs compiled for another plan, and an environment variable
does not reach workers that another machine's Ray starts. The model class is chosen the same way, by an override of the
configuration's `architectures` (`headsink_vllm`).
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from headsink.errors import HeadsinkError
from headsink.models.families import VLLM_CLASSES
from headsink.plan.plan import Plan
from headsink.utils.versions import check_vllm
from headsink_vllm import PREFIX

KEY = "headsink_plan"  # in additional_config
ANOTHER_PLAN = "make one with `headsink plan --no-top-k`"


def check_servable(plan: Plan) -> None:
    """Raise if vLLM cannot run a plan, with what to do instead."""
    heads = [head for layer in plan.layers for head in layer or ()]
    if plan.model.architecture not in VLLM_CLASSES:
        names = ", ".join(family.removesuffix("ForCausalLM") for family in VLLM_CLASSES)
        raise HeadsinkError(f"{plan.model.architecture} is not a family that is served under a plan; {names} are")
    if any(head.top_k for head in heads):
        raise HeadsinkError(
            "the plan has top-k keys, and vLLM's scheduler must know which blocks to keep before it has seen a key; "
            f"{ANOTHER_PLAN}"
        )
    if plan.prefill_compression:
        raise HeadsinkError(
            f"the plan is for contexts that are compressed once, and vLLM lets keys go all the time; {ANOTHER_PLAN}"
        )
    if plan.positions == "cache-relative":
        raise HeadsinkError("the plan counts positions in the cache; vLLM has those of the text only: --positions text")


def engine_args(plan: Plan) -> dict[str, Any]:
    """Arguments for `vllm.LLM(model, ...)`; the server takes the same as --hf-overrides and --additional-config, in JSON."""
    check_vllm()
    check_servable(plan)
    given = plan.model_dump(mode="json", exclude={"calibration", "quality"})
    return {
        "hf_overrides": {"architectures": [PREFIX + plan.model.architecture]},
        "additional_config": {KEY: given},
    }


def given_plan(additional_config: Any) -> Plan:
    """The plan in vLLM's additional configuration."""
    found = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if found is None:
        raise HeadsinkError(
            f"additional_config has no {KEY}; start with `headsink serve` or headsink.serving.vllm.settings.engine_args"
        )
    try:
        plan = Plan.model_validate(found)
    except ValidationError as error:
        raise HeadsinkError(f"additional_config: {KEY} is not a valid plan: {error.errors()[0]['msg']}") from error
    check_servable(plan)
    return plan
