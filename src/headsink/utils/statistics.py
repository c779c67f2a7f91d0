"""Confidence intervals of means over texts, and rank correlation."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom. After the last one the normal distribution is close enough.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL = 1.96


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval; the half width is NaN for a single sample."""

    mean: Tensor
    half: Tensor


def interval(samples: Tensor) -> Interval:
    """Return Student's interval of the mean over the first dimension: [texts, ...] -> [...]."""
    count = samples.shape[0]
    if count < 2:
        return Interval(samples.mean(0), torch.full_like(samples[0], torch.nan))
    t = STUDENT[count - 2] if count - 2 < len(STUDENT) else NORMAL
    return Interval(samples.mean(0), t * samples.std(0) / count**0.5)


def difference(before: Tensor, after: Tensor, paired: bool) -> Interval:
    """Return the change of a mean over texts, [texts, ...] each.

    paired: both have the same texts in the same order.
    """
    if paired:
        return interval(after - before)
    one, two = interval(before), interval(after)
    return Interval(two.mean - one.mean, (one.half.square() + two.half.square()).sqrt())


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rho, with ties at their mean rank; None if one side is constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    rho = torch.corrcoef(ranks)[0, 1]
    return float(rho) if torch.isfinite(rho) else None


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, minimum, maximum and the list of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}
