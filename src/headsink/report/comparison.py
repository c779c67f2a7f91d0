"""Write the report of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headsink.census.compare import Comparison


def write_comparison(comparison: Comparison, path: Path) -> None:
    raise NotImplementedError
