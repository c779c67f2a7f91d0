"""How drafted tokens are accepted, and how many to draft (speculative sampling, Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 8  # drafted tokens per round at most
MEMORY = 0.9  # weight of the past in the running means of acceptance and time
AGAIN = 32  # rounds without a draft after which one token is drafted, to measure the acceptance again


class DraftLength:
    """Choose the number of tokens to draft that maximises expected tokens per second, from measured acceptance and times."""

    def __init__(self) -> None:
        self.acceptance, self.draft, self.idle = 0.8, 0.0, 0
        self.verify: dict[int, float] = {}  # number of tokens -> seconds

    def choose(self) -> int:
        if not self.verify:
            return 0  # measure the time of a pass of one token
        if len(self.verify) == 1:
            return 3
        if self.idle >= AGAIN:
            return 1
        return max(range(MOST + 1), key=lambda drafted: self._expected(drafted) / self._seconds(drafted))

    def _expected(self, drafted: int) -> float:
        return sum(self.acceptance**n for n in range(drafted + 1))

    def _seconds(self, drafted: int) -> float:
        """Expected seconds of a round. Verification time is linear between the fewest and most tokens measured."""
        few, many = min(self.verify), max(self.verify)
        slope = max(0.0, (self.verify[many] - self.verify[few]) / (many - few))
        return drafted * self.draft + max(1e-9, self.verify[few] + slope * (drafted + 1 - few))

    def update(self, drafted: int, draft: float, verify: float, accepted: float) -> None:
        """Record a round. draft, verify: seconds; accepted: tokens, mean over rows."""
        self.verify[drafted + 1] = _mean(self.verify.get(drafted + 1), verify)
        self.idle = 0 if drafted else self.idle + 1
        if drafted:
            self.draft = _mean(self.draft or None, draft / drafted)
            verified = min(accepted + 1, drafted)  # tokens after the first rejected one are not judged
            self.acceptance = min(0.999, _mean(self.acceptance, accepted / verified))


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
    """The drafted tokens accepted at random, and a token drawn from the remaining distribution."""
    for n, guess in enumerate(guesses):
        p, q = scores[n].softmax(-1), proposals[n].softmax(-1)
        if not float(torch.rand((), device=p.device)) * float(q[guess]) < float(p[guess]):
            left = (p - q).clamp(min=0)
            return guesses[:n], int(torch.multinomial(left if left.any() else p, 1))
    return guesses, int(torch.multinomial(scores[len(guesses)].softmax(-1), 1))
