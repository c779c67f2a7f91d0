"""Turn docstrings into Markdown for the API reference: a griffe extension that mkdocs loads.

A section (`Parameters`, `Returns`, `Raises`) becomes a bold line. `name : what it is`, with the indented lines after
it, becomes a list item. Types stand in the signature.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"([A-Za-z_*][\w*, ]*) : (.*)")
RULE = re.compile(r"-{3,}")


class Docstrings(griffe.Extension):
    """Rewrites every docstring when its object is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    lines: list[str] = []
    in_item = False
    for line in text.splitlines():
        stripped = line.strip()
        if RULE.fullmatch(stripped) and lines:
            lines[-1:] = [f"**{lines[-1].strip()}**", ""]
            in_item = False
        elif found := ITEM.fullmatch(line):
            lines += ([] if in_item else [""]) + [f"- `{found[1]}`: {found[2]}"]
            in_item = True
        elif in_item and line.startswith(" ") and stripped:
            lines.append(f"  {stripped}")
        else:
            lines += ["", line] if in_item and stripped else [line]
            in_item = False
    return re.sub(r"\](?=\[)", r"\]", "\n".join(lines))  # [layers][heads] is a shape and not a link
