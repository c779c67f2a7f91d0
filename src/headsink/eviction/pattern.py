"""The pattern of a KV head: how many keys it keeps. attention/reference.py has the rule that says which, as a mask."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from headsink.errors import HeadsinkError

LONGEST = 2**31 - 1  # largest number of tokens in a pattern; kernels use 32-bit counters


@dataclass(frozen=True, slots=True)
class Pattern:
    """The keys that the queries of one KV head may see.

    Parameters
    ----------
    sink : number of initial tokens that are always visible.
    top_k : number of visible keys outside the window, those with the highest importance scores.
    window : number of most recent visible keys, including the query's own; `None` is full attention.

    `Pattern()` is full attention, and `Pattern(4, 0, 128)` is StreamingLLM's (arXiv 2309.17453). `Pattern(4, 0, 0)` sees the sink
    tokens only. `Pattern(0, 0, 0)` sees nothing, and its output is zero.
    """

    sink: int = 0
    top_k: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("sink", "top_k", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise HeadsinkError(f"{name}: {value!r} is not a whole number of tokens, 0 or more")
            if value > LONGEST:
                raise HeadsinkError(f"{name}: {value} tokens are over {LONGEST}, the most that kernels count to")
        if self.window is None and (self.sink or self.top_k):
            raise HeadsinkError("window: full attention (window=None) sees every key, so sink and top_k must be 0")

    @property
    def full(self) -> bool:
        return self.window is None

    def size(self, context: int) -> int:
        """Return the number of cached keys for a text of `context` tokens."""
        return context if self.window is None else min(context, self.sink + self.top_k + self.window)

    def widen(self, window: int) -> Pattern:
        """Return the pattern with a window of at least `window` tokens. Full attention stays full."""
        return self if self.window is None else replace(self, window=max(self.window, window))

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "full", "4+256" (sink and window) or "4+32k+256" (sink, top-k and window), as `str` writes them."""
        if text == "full":
            return cls()
        parts = re.fullmatch(r"(\d{1,10})\+(?:(\d{1,10})k\+)?(\d{1,10})", text)
        if parts is None:
            raise HeadsinkError(f"pattern: {text!r} is not SINK+WINDOW or SINK+TOPk+WINDOW, such as 4+256 or 4+32k+256")
        return cls(*(int(part or 0) for part in parts.groups()))

    def __str__(self) -> str:
        if self.window is None:
            return "full"
        return f"{self.sink}+{self.top_k}k+{self.window}"


FULL = Pattern()


FOREVER = 2**31 - 1  # larger than every column; fits into int32
