"""headsink: find the attention heads that look at nothing far away, and stop paying for them.

A public name imports its module when it is first used, so that `import headsink` and the command line's help take no time. Type
checkers and editors read `__init__.pyi`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_MODULES = {
    "calibrate": ("calibrate",),
    "census": ("Census", "Comparison", "analyze", "compare"),
    "decode": ("decode",),
    "errors": ("HeadsinkError",),
    "method": ("Method",),
    "models": ("load",),
    "pattern": ("Pattern",),
    "plan": ("Plan",),
    "prefix": ("load_prefix", "save_prefix"),
    "runtime": ("apply", "compress", "new_cache"),
    "speculate": ("generate_lossless",),
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


class _Package(ModuleType):
    """Importing the modules `calibrate` and `decode` must not hide the functions of the same names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
