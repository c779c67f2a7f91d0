"""HTML pages in notebooks: in a frame of their own, so that neither their styles nor their scripts meet the notebook's."""

from __future__ import annotations

import sys
import tempfile
import webbrowser
from html import escape
from pathlib import Path

HEIGHT = 900  # CSS pixels of a page that `show` shows


def frame(page: str, height: int) -> str:
    """A page as a notebook's output, `height` CSS pixels high."""
    return (
        f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts allow-downloads" '
        f'style="width: 100%; height: {height}px; border: 0" title="headsink"></iframe>'
    )


def show(page: str) -> None:
    """Show a page in the notebook that runs this code; elsewhere write it to a temporary file and open that in a browser."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None and hasattr(ipython.get_ipython(), "kernel"):
        from IPython.display import HTML, display  # type: ignore[import-not-found]

        display(HTML(frame(page, HEIGHT)))
        return
    with tempfile.NamedTemporaryFile("w", prefix="headsink-", suffix=".html", delete=False, encoding="utf-8") as file:
        file.write(page)
    webbrowser.open(Path(file.name).as_uri())
