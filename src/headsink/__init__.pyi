from headsink.calibrate import calibrate
from headsink.census import Census, Comparison, analyze, compare
from headsink.decode import decode
from headsink.errors import HeadsinkError
from headsink.method import Method
from headsink.models import load
from headsink.pattern import Pattern
from headsink.plan import Plan
from headsink.prefix import load_prefix, save_prefix
from headsink.runtime import apply, compress, new_cache
from headsink.speculate import generate_lossless

__all__ = [
    "Census",
    "Comparison",
    "HeadsinkError",
    "Method",
    "Pattern",
    "Plan",
    "analyze",
    "apply",
    "calibrate",
    "compare",
    "compress",
    "decode",
    "generate_lossless",
    "load",
    "load_prefix",
    "new_cache",
    "save_prefix",
]
