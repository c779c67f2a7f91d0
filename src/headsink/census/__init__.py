"""What every attention head looks at: statistics, roles, the first question, and comparisons of runs."""

from headsink.census.census import Census, analyze
from headsink.census.compare import Comparison, compare

__all__ = ["Census", "Comparison", "analyze", "compare"]
