"""The argument name of the KV cache in transformers: `cache` since 5.24, `past_key_values` before.

transformers still accepts the old name, but warns. Only this module uses the names.
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
    """Return `cache` as a keyword argument of a model or of `generate`."""
    return {CACHE: cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a model or of `generate`, under either name, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def with_cache(module: nn.Module, arguments: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """Return keyword arguments with `cache` added under the name that the module's `forward` uses."""
    known = _parameters(type(module).forward)
    name = next((name for name in NAMES if name in known), CACHE)
    return {key: value for key, value in arguments.items() if key not in NAMES} | {name: cache}


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a module call by name."""
    return dict(zip(_parameters(type(module).forward), args, strict=False)) | kwargs


@lru_cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the argument names of a module's `forward`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def returned_cache(output: Any) -> Any:
    """Return the cache in the output of a model."""
    return getattr(output, CACHE)


def without_cache(output: Any) -> Any:
    """Return the output of a model without its cache."""
    if isinstance(output, tuple):
        return tuple(part for part in output if not isinstance(part, Cache))
    return type(output)(**{name: value for name, value in output.items() if name != CACHE})


def assists() -> bool:
    """Whether the caller is assisted generation, which crops the cache.

    transformers does not announce this to a cache of full-attention layers, since such layers can always be cropped.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_assisted_decoding":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def drafted() -> int:
    """How many tokens of the running call are drafts. Assisted generation gives the first ones together with the prompt."""
    frame = sys._getframe(1)
    while (
        frame is not None and frame.f_code.co_name != "generate"
    ):  # `generate` of the assistant is none of these calls
        if frame.f_code.co_name == "_assisted_decoding":
            return int(frame.f_locals.get("candidate_length", 0))
        frame = frame.f_back  # type: ignore[assignment]
    return 0


def generate_argument(name: str) -> Any:
    """Return an argument of the `generate` call that runs the current decoding loop, or None.

    transformers passes `streamer` and `assistant_model` to its own loops, but not to custom ones.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return frame.f_locals.get(name)
        frame = frame.f_back  # type: ignore[assignment]
    return None
