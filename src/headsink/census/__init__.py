"""What every attention head looks at: statistics, roles, the first question, and comparisons of runs."""

from headsink.census.compare import Comparison, compare
from headsink.census.results import Census
from headsink.census.run import analyze

__all__ = ["Census", "Comparison", "analyze", "compare"]
