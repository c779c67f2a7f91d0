"""Where drafted tokens come from, how many to draft, and how they are accepted (speculative sampling, arXiv 2211.17192)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 8  # drafted tokens per round at most
MEMORY = 0.9  # weight of the past in the running means of acceptance and time
AGAIN = 64  # tokens without a draft after which one token is drafted, to measure again; twice as many each time
MATCH = 3  # tokens that must be the same for a lookup
FIRST = 4  # tokens without a draft at the beginning


@dataclass
class Source:
    """Drafts of one kind. acceptance: probability that a token is accepted if those before it are. seconds: to draft a token,
    None if not measured."""

    acceptance: float
    seconds: float | None = None

    def judge(self, accepted: float) -> None:
        """Record the share of judged tokens that were accepted."""
        self.acceptance = min(0.999, _mean(self.acceptance, accepted))


class DraftLength:
    """Choose what to draft, and how many tokens, by expected tokens per second, from measured acceptance and times.

    cache: drafts of the compressed cache. lookup: what followed the last tokens where they stood before (`Lookup`).
    """

    def __init__(self) -> None:
        self.cache, self.lookup = Source(0.8), Source(0.5, 0.0)
        self.idle, self.patience = 0, AGAIN
        self.verify: dict[int, float] = {}  # number of tokens -> seconds
        self.rounds = Counter[int]()  # of each number of tokens

    def choose(self, matched: int = 0) -> tuple[Source, int]:
        """Return the source and the number of tokens to draft, 0 for none. matched: tokens that a lookup has found."""
        if self.rounds[1] < FIRST:
            return self.cache, 0  # measure the time of a pass of one token
        if len(self.verify) == 1:
            return self.cache, 3
        options = [(self.cache, n) for n in range(MOST + 1)] + [(self.lookup, n + 1) for n in range(min(matched, MOST))]
        best = max(options, key=lambda option: self._expected(*option) / self._seconds(*option))
        if best[1]:
            self.patience = AGAIN
        elif self.idle >= self.patience:
            self.patience *= 2
            return self.cache, 1
        return best

    def _expected(self, source: Source, drafted: int) -> float:
        return sum(source.acceptance**n for n in range(drafted + 1))

    def _seconds(self, source: Source, drafted: int) -> float:
        """Expected seconds of a round.

        A pass of one token may be another kernel, so the others are on a line between the fewest and most tokens measured.
        """
        if not drafted:
            return max(1e-9, self.verify[min(self.verify)])
        several = {tokens: seconds for tokens, seconds in self.verify.items() if tokens > 1} or self.verify
        few, many = min(several), max(several)
        slope = max(0.0, (several[many] - several[few]) / max(1, many - few))
        draft = self.verify[min(self.verify)] if source.seconds is None else source.seconds
        return drafted * draft + max(1e-9, several[few] + slope * (drafted + 1 - few))

    def update(self, source: Source, drafted: int, draft: float, verify: float, accepted: float) -> None:
        """Record a round. draft, verify: seconds; accepted: tokens, mean over rows."""
        tokens = drafted + 1
        known, self.rounds[tokens] = self.verify.get(tokens), self.rounds[tokens] + 1
        if self.rounds[tokens] == 2 and known is not None:  # the first pass may also allocate memory
            known = min(known, verify)
        self.verify[tokens] = _mean(known, verify)
        self.idle = 0 if drafted else self.idle + 1
        if drafted:
            source.seconds = _mean(source.seconds, draft / drafted)
            source.judge(accepted / min(accepted + 1, drafted))  # tokens after the first rejected one are not judged


class Lookup:
    """What followed the last tokens of a text where the same ones stood before (prompt lookup)."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # the last tokens before a position -> the last such position
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        if len(self.ids) >= MATCH:
            self.after[tuple(self.ids[-MATCH:])] = len(self.ids)
        self.ids.append(token)

    def find(self) -> list[int]:
        """Return `MOST` tokens, which repeat if fewer have followed; none if the last tokens are new."""
        at = self.after.get(tuple(self.ids[-MATCH:]))
        return [] if at is None else [self.ids[at + n % (len(self.ids) - at)] for n in range(MOST)]


def _mean(mean: float | None, value: float) -> float:
    """Running mean after a new value."""
    return value if mean is None else MEMORY * mean + (1 - MEMORY) * value


def accept_greedy(scores: list[Tensor], guesses: list[int], proposals: list[Tensor]) -> tuple[list[int], int]:
    """The drafted tokens that equal greedy decoding with the full cache, and the token after them."""
    for n, guess in enumerate(guesses):
        own = int(scores[n].argmax())
        if own != guess:
            return guesses[:n], own
    return guesses, int(scores[len(guesses)].argmax())


def accept_sampled(scores: list[Tensor], guesses: list[int], proposals: list[Tensor]) -> tuple[list[int], int]:
    """The drafted tokens accepted at random, and a token drawn from the remaining distribution.

    proposals: logits from which the guesses were drawn; none if they were not drawn.
    """
    for n, guess in enumerate(guesses):
        p = scores[n].softmax(-1)
        q = (
            proposals[n].softmax(-1)
            if proposals
            else torch.zeros_like(p).index_fill(0, torch.tensor(guess, device=p.device), 1)
        )
        if not float(torch.rand((), device=p.device)) * float(q[guess]) < float(p[guess]):
            left = (p - q).clamp(min=0)
            return guesses[:n], int(torch.multinomial(left if left.any() else p, 1))
    return guesses, int(torch.multinomial(scores[len(guesses)].softmax(-1), 1))
