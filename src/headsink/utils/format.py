"""Numbers and texts as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def harmless(text: str, most: int = 80) -> str:
    """The beginning of a text from a file as it may stand in a line: escaped, unless it is a plain word."""
    start = text[:most]
    return start if start.replace("_", "").isalnum() else repr(start)


def share(value: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "–" if value is None else f"{value:.0%}"


def percent(value: float | None) -> str:
    """A share as a length of CSS."""
    return f"{100 * min(1, max(0, value or 0))}%"


def p_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def figures(value: float | None, places: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:.{places}f}"


def visible(token: str) -> str:
    """A token with its white space shown."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
