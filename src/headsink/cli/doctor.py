"""`headsink doctor`: what is on this machine, and whether attention comes out right on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from headsink.cli.models import list_models
from headsink.cli.options import RunOptions, Seed
from headsink.models.builtin import cache_folder
from headsink.utils.terminal import emit, new_table, note, out
from headsink.utils.versions import NEWEST, OLDEST

if TYPE_CHECKING:
    import torch


PACKAGES = (
    "headsink",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "gguf",
    "pyarrow",
    "altair",
    "numba",
    "triton",
    "vllm",
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}  # of the output, whose entries are about 1
PATTERNS = ((4, 0, 16), (2, 3, 9), (1, 0, 0))


@dataclass(frozen=True)
class DoctorOptions(RunOptions):
    """Options of `headsink doctor`."""

    seed: Seed = 0


def doctor(options: DoctorOptions) -> None:
    """Check this machine: versions, devices, threads, models, and attention against its reference."""
    if warning := transformers_warning():
        note(warning)  # first: what was not tested may not even import
    found = examine(device=options.device, dtype=options.dtype, seed=options.seed)
    if options.as_json:
        emit(found)
    else:
        print_examination(found)
    if not found["attention"]["right"]:
        raise typer.Exit(1)


def examine(*, device: str | None, dtype: str | None, seed: int) -> dict[str, Any]:
    """Versions, devices and threads, and attention over the cache compared with the definition on this device."""
    import torch

    from headsink.models.devices import parse_device, parse_dtype

    chosen = parse_device(device)
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "transformers": {"oldest": OLDEST, "newest": NEWEST, "warning": transformers_warning()},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "models": {model["name"]: model["installed"] for model in list_models()["built_in"]},
        "cache_folder": str(cache_folder()),
        "attention": check_attention(chosen, parse_dtype(dtype) or torch.float32, seed),
    }


def transformers_warning() -> str | None:
    """One line with the command that helps, if the installed transformers is not a version that headsink is tested with."""
    found = _version("transformers") or ""
    number = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    oldest, newest = (tuple(map(int, one.split("."))) for one in (OLDEST, NEWEST))
    if oldest <= number <= newest:
        return None
    right = f'pip install "transformers>={OLDEST},<{newest[0]}.{newest[1] + 1}"'
    return f"transformers {found} is not tested: headsink is tested with {OLDEST} to {NEWEST}; run: {right}"


def check_attention(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Largest difference between attention over the cache, prefill and decode, and the definition in float64."""
    import torch

    from headsink.attention.params import AttentionParams
    from headsink.attention.reference import reference_attention
    from headsink.cache.head_group import HeadGroup
    from headsink.cache.options import LayerOptions
    from headsink.eviction.pattern import Pattern
    from headsink.eviction.scorers import LINEAR
    from headsink.models.devices import dtype_name

    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, 300, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    weights, scaling, worst = torch.randn(2, LINEAR.n_features(64), generator=generator), 0.125, 0.0
    module: Any = torch.nn.Identity()
    module.num_key_value_groups = 2
    for pattern in (Pattern(*numbers) for numbers in PATTERNS):
        exact = [t.cpu().double() for t in (query, key, value)]
        expected = reference_attention(exact[0], exact[1], exact[2], [pattern] * 2, weights, scaling)
        group, found = HeadGroup(pattern, [0, 1], LayerOptions(weights), key, None), []
        for part in (slice(0, 280), *(slice(n, n + 1) for n in range(280, 300))):
            new = (t[:, :, part] for t in (query, key, value))
            asked = next(new)
            found.append(group.append(*new)(module, asked, AttentionParams(scaling)))
        worst = max(worst, float((torch.cat(found, 2).cpu().double() - expected).abs().max()))
    return {
        "device": str(device),
        "dtype": dtype_name(dtype),
        "largest_difference": worst,
        "right": worst <= TOLERANCE[dtype_name(dtype)],
    }


def print_examination(found: dict[str, Any]) -> None:
    table = new_table(None, "what", "found")
    table.add_row("python", f"{found['python']}, {found['system']}")
    tested = {"transformers": f" (tested: {OLDEST} to {NEWEST})"}
    for name, number in found["packages"].items():
        table.add_row(name, f"{number or 'not installed'}{tested.get(name, '')}")
    table.add_row("cores, threads", f"{found['cores']}, {found['threads']}")
    table.add_row("GPUs", ", ".join(found["gpus"]) or "none")
    installed = (f"{name}: {'yes' if here else 'no'}" for name, here in found["models"].items())
    table.add_row("built-in models", ", ".join(installed))
    table.add_row("cache folder", escape(found["cache_folder"]))
    check = found["attention"]
    verdict = "right" if check["right"] else "WRONG"
    table.add_row(
        "attention",
        f"{verdict} on {check['device']} in {check['dtype']} (largest difference {check['largest_difference']:.1e})",
    )
    out.print(table)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return "present" if importlib.util.find_spec(package) else None
