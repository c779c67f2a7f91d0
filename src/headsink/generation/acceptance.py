"""How many tokens to draft, and which drafted tokens are accepted (speculative sampling, arXiv 2211.17192)."""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from torch import Tensor

MOST = 8  # drafted tokens per round at most
MEMORY = 0.9  # weight of the past in the running means of acceptance and time
AGAIN = 64  # tokens without a draft after which one token is drafted, to measure again; twice as many each time
FIRST = 4  # tokens without a draft at the beginning


class DraftLength:
    """Choose how many tokens of the compressed cache to draft, by expected tokens per second, from measured acceptance and times.

    acceptance: probability that a token is accepted if those before it are. draft: seconds to draft one, None if unknown.
    """

    def __init__(self) -> None:
        self.acceptance, self.draft = 0.8, cast(float | None, None)
        self.idle, self.patience = 0, AGAIN
        self.verify: dict[int, float] = {}  # number of tokens -> seconds
        self.rounds = Counter[int]()  # of each number of tokens

    def choose(self) -> int:
        """Return the number of tokens to draft, 0 for none."""
        if self.rounds[1] < FIRST:
            return 0  # measure the time of a pass of one token
        if len(self.verify) == 1:
            return 3
        best = max(range(MOST + 1), key=lambda drafted: self._expected(drafted) / self._seconds(drafted))
        if best:
            self.patience = AGAIN
        elif self.idle >= self.patience:
            self.patience *= 2
            return 1
        return best

    def _expected(self, drafted: int) -> float:
        return sum(self.acceptance**n for n in range(drafted + 1))

    def _seconds(self, drafted: int) -> float:
        """Expected seconds of a round.

        A pass of one token may be another kernel, so the others are on a line between the fewest and most tokens measured.
        """
        if not drafted:
            return max(1e-9, self.verify[min(self.verify)])
        several = {tokens: seconds for tokens, seconds in self.verify.items() if tokens > 1} or self.verify
        few, many = min(several), max(several)
        slope = max(0.0, (several[many] - several[few]) / max(1, many - few))
        draft = self.verify[min(self.verify)] if self.draft is None else self.draft
        return drafted * draft + max(1e-9, several[few] + slope * (drafted + 1 - few))

    def update(self, drafted: int, draft: float, verify: float, accepted: float) -> None:
        """Record a round. draft, verify: seconds; accepted: tokens, mean over rows."""
        tokens = drafted + 1
        known, self.rounds[tokens] = self.verify.get(tokens), self.rounds[tokens] + 1
        if self.rounds[tokens] == 2 and known is not None:  # the first pass may also allocate memory
            known = min(known, verify)
        self.verify[tokens] = running_mean(known, verify)
        self.idle = 0 if drafted else self.idle + 1
        if drafted:
            self.draft = running_mean(self.draft, draft / drafted)
            judged = accepted / min(accepted + 1, drafted)  # tokens after the first rejected one are not judged
            self.acceptance = min(0.999, running_mean(self.acceptance, judged))


def running_mean(mean: float | None, value: float) -> float:
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
