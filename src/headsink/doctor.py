"""What is on this machine, and whether attention comes out right on it."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from headsink.head_group import HeadGroup
from headsink.models import BUILT_IN, cache_folder, dtype_name, parse_device, parse_dtype
from headsink.pattern import Pattern, reference_attention
from headsink.rows import Softmax
from headsink.scores import n_features

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
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the output, whose entries are about 1
PATTERNS = (Pattern(4, 0, 16), Pattern(2, 3, 9), Pattern(1, 0, 0))


def models() -> dict[str, Any]:
    """The built-in models: installed or not, and how to install them."""
    listed = []
    for model in BUILT_IN.values():
        paths = model.paths()
        listed.append(
            {
                "name": model.name,
                "title": model.title,
                "licence": model.licence,
                "installed": paths is not None,
                "install": model.install,
                "bytes": sum(path.stat().st_size for path in paths) if paths else None,
            }
        )
    return {
        "built_in": listed,
        "others": "a folder as transformers saves it, a .gguf file, or a Hugging Face id owner/name",
        "tested_families": [
            "Llama",
            "Qwen2",
            "Qwen3",
            "Mistral",
            "Gemma 2",
            "Gemma 3",
            "Phi-3",
            "OLMo-2",
            "Granite",
            "gpt-oss",
        ],
    }


def examine(*, device: str | None, dtype: str | None, seed: int) -> dict[str, Any]:
    """Versions, devices and threads, and attention over the cache compared with the definition on this device."""
    chosen = parse_device(device)
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "models": {model["name"]: model["installed"] for model in models()["built_in"]},
        "cache_folder": str(cache_folder()),
        "attention": check_attention(chosen, parse_dtype(dtype) or torch.float32, seed),
    }


def check_attention(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Largest difference between attention over the cache, prefill and decode, and the definition in float64."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, 300, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    weights, scaling, worst = torch.randn(2, n_features(64), generator=generator), 0.125, 0.0
    module: Any = torch.nn.Identity()
    module.num_key_value_groups = 2
    for pattern in PATTERNS:
        exact = [t.cpu().double() for t in (query, key, value)]
        expected = reference_attention(exact[0], exact[1], exact[2], [pattern] * 2, weights, scaling)
        group, found = HeadGroup(pattern, [0, 1], weights, key, None), []
        for part in (slice(0, 280), *(slice(n, n + 1) for n in range(280, 300))):
            new = (t[:, :, part] for t in (query, key, value))
            found.append(group.attend(module, next(new), next(new), next(new), Softmax(scaling)))
        worst = max(worst, float((torch.cat(found, 2).cpu().double() - expected).abs().max()))
    return {
        "device": str(device),
        "dtype": dtype_name(dtype),
        "largest_difference": worst,
        "right": worst <= TOLERANCE[dtype],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return "present" if importlib.util.find_spec(package) else None
