"""Triton's interpreter, with less overhead: functions of `triton.language` are replaced once a launch, types are made once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from triton.language import core
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


def make_types_once() -> None:
    """Keep the type and the shape of every kind of tensor, which the interpreter makes anew for each operation."""
    new_block, numpy_type = core.block_type.__init__, interpreter._get_np_dtype
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    numpy_types: dict[str, Any] = {}

    @cache
    def size(shape: tuple[int, ...]) -> tuple[core.constexpr, core.tuple]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(one) for one in shape])

    def init_block(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(one, "value", one) for one in shape)
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        self.__dict__.update(blocks[key])

    def init_tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = size(tuple(type.shape) if type.is_block() else ())

    def get_numpy_type(kind: core.dtype) -> Any:
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
    interpreter._get_np_dtype = get_numpy_type
