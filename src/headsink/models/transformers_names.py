"""The names that transformers gives to a KV cache: `cache` from 5.24 on, `past_key_values` before.

Nothing else in headsink spells them out. transformers takes the old name with a warning, which users should not see for
calls that headsink makes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("cache", "past_key_values")
CACHE = next(name for name in NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """`cache` as a keyword argument of a model or of `generate`."""
    return {CACHE: cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model or of `generate`, under either name; None if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def with_cache(module: nn.Module, arguments: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """The keyword arguments of a module with `cache` under the name that its `forward` has."""
    known = _parameters(type(module).forward)
    name = next((name for name in NAMES if name in known), CACHE)
    return {key: value for key, value in arguments.items() if key not in NAMES} | {name: cache}


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a module by name."""
    return dict(zip(_parameters(type(module).forward), args, strict=False)) | kwargs


@lru_cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a module's `forward`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def returned_cache(output: Any) -> Any:
    """The cache in the output of a model."""
    return getattr(output, CACHE)


def without_cache(output: Any) -> Any:
    """The output of a model without its cache."""
    if isinstance(output, tuple):
        return tuple(part for part in output if not isinstance(part, Cache))
    return type(output)(**{name: value for name, value in output.items() if name != CACHE})


def assists() -> bool:
    """Whether the call comes from assisted generation, which takes tokens back.

    transformers tells a cache of full-attention layers nothing of that before the first token, since such layers can always
    be cropped.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_assisted_decoding":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def generate_argument(name: str) -> Any:
    """An argument of the call of `generate` that a decoding loop runs in, None if there is none.

    transformers hands its own loops `streamer` and `assistant_model`, but not a loop that it is given.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return frame.f_locals.get(name)
        frame = frame.f_back  # type: ignore[assignment]
    return None
