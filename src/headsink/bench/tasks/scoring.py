"""Scores of answers, and intervals and p-values of mean scores over items.

Intervals are 95 % bootstrap intervals over items. A change is measured on the same items, so its interval is that of the
differences. Its p is that of the two-sided sign-flip test: exact for up to 16 items that differ, 20,000 random draws for more.
For scores of 0 and 1 this is McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Sequence

RESAMPLES = 10_000
EXACT = 16  # up to so many items that differ, try all 2^n signs
FLIPS = 20_000


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def same_answer(text: str, answer: str) -> bool:
    """Return whether the final answer of a solution equals `answer` (LaTeX), by math-verify.

    It takes what follows the last "final answer is", or the boxes, else what follows the last "answer", else the last formula or
    number, and compares numbers, expressions, sets, intervals and matrices by their values: 2x and x*2 are equal. An answer that
    takes longer than 5 seconds to compare is wrong.
    """
    from math_verify import parse, verify  # imports sympy

    return bool(verify(parse(f"${answer}$"), parse(text)))


# over items


def interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """Return the 95 % bootstrap interval of a mean over items, [low, high]."""
    import torch  # imported here, because the command line reads the names of tasks without torch

    of = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(of), (RESAMPLES, len(of)), generator=torch.Generator().manual_seed(seed))
    low, high = of[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = float(of.mean())
    return [min(low, mean), max(high, mean)]  # rounding could put the mean of a constant outside


def p_value(changes: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p of a mean change: the share of random signs whose mean is at least as far from 0."""
    import torch

    nonzero = torch.tensor([change for change in changes if change], dtype=torch.float64)
    if not len(nonzero):
        return 1.0
    if len(nonzero) <= EXACT:
        signs = (torch.arange(2 ** len(nonzero))[:, None] >> torch.arange(len(nonzero))) % 2
    else:
        signs = torch.randint(2, (FLIPS, len(nonzero)), generator=torch.Generator().manual_seed(seed))
    sums = ((2 * signs - 1) * nonzero).sum(1).abs()
    extreme = int((sums >= nonzero.sum().abs() - 1e-12 * nonzero.abs().sum()).sum())
    return extreme / len(sums) if len(nonzero) <= EXACT else (extreme + 1) / (len(sums) + 1)
