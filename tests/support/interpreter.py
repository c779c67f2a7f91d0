"""Triton's interpreter, with less overhead: it replaces the functions of `triton.language` once a launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


def replace_once_a_launch() -> None:
    """Replace the functions of `triton.language` once a launch, not again at every call of a nested function.

    That takes half of the time of the interpreter. A nested function of another module, such as triton.language.standard, sees
    other names of the language, which are replaced at its first call.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[int] = set()  # ids of the globals of the modules

    def once(function: Callable[..., Any]) -> Any:
        if id(function.__globals__) in replaced:
            return interpreter._LangPatchScope()  # nothing to restore
        replaced.add(id(function.__globals__))
        return patch(function)

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    # Overflow of small tensors needs no check at every operation, which would take a third of the time that is left.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, run
