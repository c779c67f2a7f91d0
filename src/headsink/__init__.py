"""headsink: find the attention heads that look at nothing far away, and stop paying for them."""

from headsink.errors import HeadsinkError, HeadsinkWarning
from headsink.pattern import Pattern
from headsink.plan import Plan
from headsink.runtime import apply, new_cache

__all__ = ["HeadsinkError", "HeadsinkWarning", "Pattern", "Plan", "apply", "new_cache"]
