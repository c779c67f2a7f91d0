"""Makes typer commands of functions that take one options object.

The options of a command are the fields of a frozen dataclass, each an `Annotated` type that says how it is typed and what its
help is. `add_command(app, function)` looks at the dataclass that the function takes, gives typer its fields as the parameters
of a command, and calls the function with one object made of what the user typed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, get_type_hints

import typer


def add_command(app: typer.Typer, function: Callable[[Any], None], name: str | None = None, **settings: Any) -> None:
    """Add a function of one argument, `options`, as the command of its name. Its docstring is the help."""
    options = get_type_hints(function)["options"]
    types, signature = get_type_hints(options, include_extras=True), inspect.signature(options)
    parameters = [one.replace(annotation=types[field]) for field, one in signature.parameters.items()]

    @wraps(function)
    def call(**given: Any) -> None:
        function(options(**given))

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # typer breaks lines where the docstring does: one line a paragraph, so that help fits every terminal
    call.__doc__ = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n"))
    app.command(name=name, **settings)(call)
