"""Format numbers and text for display."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def harmless(text: str, most: int = 80) -> str:
    """Return the start of a text from a file, escaped unless it is a plain word."""
    start = text[:most]
    return start if start.replace("_", "").isalnum() else repr(start)


def share(value: float | None) -> str:
    """Format a fraction as a percentage; a dash for None."""
    return "–" if value is None else f"{value:.0%}"


def percent(value: float | None) -> str:
    """Format a fraction as a CSS length."""
    return f"{100 * min(1, max(0, value or 0))}%"


def p_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def figures(value: float | None, places: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:.{places}f}"


def visible(token: str) -> str:
    """Return a token with visible white space."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def html_table(caption: str, rows: Mapping[str, str]) -> str:
    """Format {title: text} as an HTML table for notebooks. The text is escaped."""
    cells = "".join(f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table><caption>{caption}</caption>{cells}</table>"
