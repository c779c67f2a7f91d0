"""Engine arguments for serving a plan with vLLM, and the checks whether it can be served. Nothing here imports vLLM.

The plan's contents, not its file name, go into vLLM's `additional_config`. vLLM passes this to the engine and to every worker, on
all machines, and includes it in the key of its cache of compiled graphs. With a file name or an environment variable, graphs
compiled for another plan could be used after a change, and an environment variable does not reach Ray workers on other machines.
An override of the configuration's `architectures` selects the model class (`headsink_vllm`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headsink.errors import HeadsinkError
from headsink.models.families import VLLM_CLASSES
from headsink.plan.plan import Plan
from headsink.utils.versions import check_vllm
from headsink_vllm import PREFIX

KEY, PREFILL = "headsink_plan", "headsink_prefill"  # in additional_config
CONNECTOR, PREFIXES = "headsink.serving.vllm.connector", "prefixes"  # module, and key in its configuration


def check_servable(plan: Plan) -> None:
    """Raise HeadsinkError if vLLM cannot run a plan; the message says what to do instead."""
    if plan.model.architecture not in VLLM_CLASSES:
        names = ", ".join(family.removesuffix("ForCausalLM") for family in VLLM_CLASSES)
        raise HeadsinkError(
            f"{plan.model.architecture} cannot be served under a plan; the supported families are {names}"
        )
    if plan.positions == "cache-relative":
        raise HeadsinkError(
            "the plan has cache-relative positions, but vLLM supports absolute ones only; use --positions absolute"
        )


def refuse(features: Mapping[str, bool]) -> None:
    """Raise HeadsinkError for the first feature of vLLM that is on. features: name -> whether it is, of what a plan excludes."""
    for feature, enabled in features.items():
        if enabled:
            raise HeadsinkError(f"{feature} cannot be used together with a plan; start without it")


def engine_args(plan: Plan, prefill: str = "dense", prefixes: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Any]:
    """Return the arguments for `vllm.LLM(model, ...)`. The server takes them in JSON, as --hf-overrides and so on.

    prefill: "dense" reads prompts in full attention and then compresses them; "sparse" evicts while it reads. A plan without
    top-k keys is always read sparsely. prefixes: files of `headsink prefill`; a prompt that begins like one of them starts from
    it. Raises HeadsinkError if vLLM is missing or of an untested version, and if it cannot run the plan.
    """
    check_vllm()
    check_servable(plan)
    if prefill not in ("dense", "sparse"):
        raise HeadsinkError(f"prefill: {prefill!r} is neither 'dense' nor 'sparse'")
    given = plan.model_dump(mode="json", exclude={"calibration", "quality"})
    arguments = {
        "hf_overrides": {"architectures": [PREFIX + plan.model.architecture]},
        "additional_config": {KEY: given, PREFILL: prefill},
    }
    if not plan.has_top_k:
        if prefixes:
            raise HeadsinkError("prefix: vLLM starts from prefixes only under a plan with top-k keys")
        return arguments
    if prefixes and None in plan.layers:
        raise HeadsinkError("prefix: vLLM does not start from prefixes of models with sliding-window layers")
    connector = {
        "kv_connector": "SlabConnector",
        "kv_connector_module_path": CONNECTOR,
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {PREFIXES: [str(Path(file).resolve()) for file in prefixes]},
    }
    return arguments | {"enable_prefix_caching": False, "kv_transfer_config": connector}


def given_plan(additional_config: Any) -> Plan:
    """Return the plan in vLLM's additional_config. Raises HeadsinkError if there is none, or it cannot be served."""
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
