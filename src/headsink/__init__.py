"""headsink measures attention sinks per head and turns them into a smaller KV cache.

A public name imports its module on first use, so `import headsink` and the help of the command line are fast. Type checkers and
editors read `__init__.pyi`.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "calibration.calibrate": ("calibrate",),
    "calibration.method": ("Method",),
    "census.attention_weights": ("AttentionWeights", "attention_weights"),
    "census.compare": ("Comparison", "compare"),
    "census.results": ("Census",),
    "census.run": ("analyze",),
    "errors": ("HeadsinkError",),
    "evaluation.ablation": ("Ablation", "ablate"),
    "eviction.pattern": ("Pattern",),
    "generation.lossless": ("generate_lossless",),
    "models.loading": ("load",),
    "plan.packaged": ("packaged_plan",),
    "plan.plan": ("Plan",),
    "report.attention": ("AttentionMaps", "attention_maps"),
    "report.page": ("write_report",),
    "runtime.apply": ("apply", "new_cache"),
    "runtime.compress": ("compress",),
    "runtime.prefix": ("load_prefix", "save_prefix"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
