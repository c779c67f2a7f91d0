"""Format numbers and text for display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers, of which three or more in a row are a range: "1, 3", "0 to 29"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [[f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(part for run in parts for part in run)


def html_table(caption: str, rows: Mapping[str, str]) -> str:
    """Format {title: text} as an HTML table for notebooks. The text is escaped."""
    cells = "".join(f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table><caption>{caption}</caption>{cells}</table>"
