"""`Scorer`: importance scores of cached keys, from which a head's top-k keys are chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

NONE = float("-inf")  # the score of a key that cannot be a top-k key
ALWAYS = float("inf")  # the score of a top-k key that is never evicted


class Scorer(ABC):
    """Features of a cached key. Its importance score is their product with the scorer weights of its KV head.

    Calibration fits the weights by ridge regression (calibration/score_fit.py). name: in plan files. A backend whose kernels
    compute this scorer lists the name in `Backend.scorers`; with other backends torch computes the scores.
    """

    name: ClassVar[str]

    @abstractmethod
    def n_features(self, dim: int) -> int:
        """Return the number of features of a key of `dim` coordinates."""

    @abstractmethod
    def features(self, key: Tensor, value: Tensor) -> Tensor:
        """Return the features of keys, which must not depend on other keys.

        key (rotated), value: [..., dim]. Returns [..., n_features(dim)], float32 or better.
        """

    def scores(self, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        """Return the importance scores of keys: [..., heads, keys].

        key, value: [..., heads, keys, dim]; weights: [heads, n_features(dim)]. Not a matrix product, because the rounding of a
        key's score must not depend on the number of other keys.
        """
        features = self.features(key, value)
        return (features * weights.to(features)[:, None]).sum(-1)
