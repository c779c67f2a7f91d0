"""Scorer weights: fit a scorer of keys to their importance in context reconstruction.

The target of a key is its importance score (compression/reconstruction.py, KVzip, arXiv 2505.23416): the log of the largest
attention that it receives while its span of the document is reconstructed. Ridge regression of the targets on features of the key
(eviction/scorers), per KV head, gives a rule that scores new keys as they arrive. Keys with more attention have more weight
in the regression, since keys that are never kept need no exact order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headsink.attention.params import Inputs
from headsink.compression.continuations import Context
from headsink.compression.reconstruction import LEAD, SPAN, Reconstruction
from headsink.errors import HeadsinkError
from headsink.eviction.scorers import LINEAR, Scorer
from headsink.models.spec import Architecture

TOKENS = 1536  # reconstructed tokens of a document at most, in evenly spaced spans
LEAST = -14.0  # smallest target: attention below e^-14 does not matter, and it may be 0
RIDGE = 1e-4  # ridge penalty, as a fraction of the variance of each feature
WEIGHT = 0.5  # exponent: the weight of a key in the regression is its attention to this power


@dataclass(frozen=True)
class ImportanceScores:
    """Importance of reconstructed keys of one document. positions: int64 [keys]. attention: float32 [layers, KV heads, keys], log
    of the largest attention that each receives, 0 in layers that no plan governs."""

    positions: Tensor
    attention: Tensor

    def without_lead(self) -> ImportanceScores:
        """Without the first `LEAD` tokens of the document, which are sinks and unlike all other keys."""
        chosen = self.positions >= LEAD
        return ImportanceScores(self.positions[chosen], self.attention[..., chosen])


def measure_importance(context: Context, prompt: Sequence[int], whole: bool = False) -> ImportanceScores:
    """Importance of keys of a document by context reconstruction, of evenly spaced spans or of the whole document."""
    starts, shape = range(0, context.length, SPAN) if whole else _starts(context.length), context.shape
    spans = [range(start, min(start + SPAN, context.length)) for start in starts]
    reconstruction = Reconstruction(context, prompt, spans)
    attention = torch.full((shape.layers, shape.kv_heads, sum(map(len, spans))), float("-inf"))

    def attend(inputs: Inputs) -> Tensor:
        outputs, largest = reconstruction.attend(inputs)
        source = shape.source(inputs.layer)
        if shape.planned[source]:
            attention[source] = torch.maximum(attention[source], largest.cpu())
        return outputs.flatten(0, 1)[None].to(inputs.query.dtype)

    with torch.no_grad():
        context.run(reconstruction.continuations, attend)
    attention[[not own for own in shape.planned]] = 0
    return ImportanceScores(torch.tensor([position for span in spans for position in span]), attention.clamp(min=LEAST))


def _starts(length: int) -> list[int]:
    """Where spans begin: adjacent if the whole document is short enough, otherwise evenly spaced."""
    if length - LEAD <= TOKENS:
        return list(range(LEAD, length, SPAN))
    room, count = length - LEAD - SPAN, TOKENS // SPAN
    return [LEAD + round(n * room / (count - 1)) for n in range(count)]


class ScorerFit:
    """Ridge regression of importance on features, which adds up its sums document by document.

    With features x, targets y and weights w of the keys, it keeps the sums of w z z^T and w z y, where z is x and a 1.
    """

    def __init__(self, shape: Architecture, scorer: Scorer = LINEAR):
        self.shape, self.scorer = shape, scorer
        size = scorer.n_features(shape.head_dim) + 1
        self._gram = torch.zeros(shape.layers, shape.kv_heads, size, size, dtype=torch.float64)
        self._moment = torch.zeros(shape.layers, shape.kv_heads, size, dtype=torch.float64)

    def add(self, context: Context, importance: ImportanceScores) -> None:
        """Add a document. Raises HeadsinkError if its keys, values or importance are not finite."""
        for layer in (layer for layer, planned in enumerate(self.shape.planned) if planned):
            keys, values = context.key_values(layer)
            positions = importance.positions.to(keys.device)
            features = self.scorer.features(keys[:, positions], values[:, positions]).double().cpu()
            targets = importance.attention[layer].double()
            if not (features.isfinite().all() and targets.isfinite().all()):
                raise HeadsinkError("the model's attention is not finite here; try --dtype float32 or bfloat16")
            features = F.pad(features, (0, 1), value=1.0)
            weighted = ((WEIGHT * targets).exp()[..., None] * features).transpose(-1, -2)  # [heads, features, keys]
            self._gram[layer] += weighted @ features
            self._moment[layer] += (weighted @ targets[..., None])[..., 0]

    def weights(self) -> Tensor:
        """Scorer weights, float32 [layers, KV heads, features], scaled so that the largest of each head is 1, with four decimals;
        0 in layers that no plan governs."""
        planned = list(self.shape.planned)
        weights = torch.zeros(self._moment[..., 1:].shape)
        weights[planned] = _ridge(self._gram[planned], self._moment[planned])
        return weights


def _ridge(gram: Tensor, moment: Tensor) -> Tensor:
    """Ridge regression without the intercept, from sums [..., features + 1, features + 1] and [..., features + 1]."""
    total = gram[..., -1, -1]
    gram, moment = gram / total[..., None, None], moment / total[..., None]
    mean = gram[..., :-1, -1]
    covariance = gram[..., :-1, :-1] - mean[..., :, None] * mean[..., None, :]
    moment = moment[..., :-1] - mean * moment[..., -1:]
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    covariance = covariance + torch.diag_embed(RIDGE * variance + 1e-6 * variance.mean(-1, keepdim=True))
    solution = torch.cholesky_solve(moment[..., None], torch.linalg.cholesky(covariance))[..., 0]
    weights = (solution / solution.abs().amax(-1, keepdim=True).clamp(min=1e-12)).float().round(decimals=4)
    weights[~weights.any(-1), 0] = 1.0  # a head that needs no key: any weights will do
    return weights
