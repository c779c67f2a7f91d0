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
from torch import Tensor

from headsink.attention.params import Inputs
from headsink.compression.continuations import Context
from headsink.compression.reconstruction import LEAD, SPAN, Reconstruction
from headsink.errors import HeadsinkError
from headsink.eviction.scorers import LINEAR, Scorer

TOKENS = 1536  # reconstructed tokens of a document at most, in evenly spaced spans
LEAST = -14.0  # smallest target: attention below e^-14 does not matter, and it may be 0
RIDGE = 1e-4  # ridge penalty, as a fraction of the variance of each feature
WEIGHT = 0.5  # exponent: the weight of a key in the regression is its attention to this power


@dataclass(frozen=True)
class ImportanceScores:
    """Importance of reconstructed keys of one document. positions: int64 [keys]. attention: float32 [layers, KV heads, keys], log
    of the largest attention that each receives, 0 in sliding-window layers."""

    positions: Tensor
    attention: Tensor


def measure_importance(context: Context, prompt: Sequence[int], whole: bool = False) -> ImportanceScores:
    """Importance of keys of a document by context reconstruction, of evenly spaced spans or of the whole document."""
    starts, shape = range(0, context.length, SPAN) if whole else _starts(context.length), context.shape
    spans = [range(start, min(start + SPAN, context.length)) for start in starts]
    reconstruction = Reconstruction(context, prompt, spans)
    attention = torch.zeros(shape.layers, shape.kv_heads, sum(map(len, spans)))

    def attend(inputs: Inputs) -> Tensor:
        outputs, largest = reconstruction.attend(inputs)
        if inputs.sliding is None:
            attention[inputs.layer] = largest.cpu()
        return outputs.flatten(0, 1)[None].to(inputs.query.dtype)

    with torch.no_grad():
        context.run(reconstruction.continuations, attend)
    return ImportanceScores(torch.tensor([position for span in spans for position in span]), attention.clamp(min=LEAST))


def _starts(length: int) -> list[int]:
    """Where spans begin: adjacent if the whole document is short enough, otherwise evenly spaced."""
    if length - LEAD <= TOKENS:
        return list(range(LEAD, length, SPAN))
    room, count = length - LEAD - SPAN, TOKENS // SPAN
    return [LEAD + round(n * room / (count - 1)) for n in range(count)]


def fit(contexts: Sequence[Context], demands: Sequence[ImportanceScores], scorer: Scorer = LINEAR) -> Tensor:
    """Scorer weights, float32 [layers, KV heads, features], scaled so that the largest of each head is 1, with four decimals."""
    shape = contexts[0].shape
    weights = torch.zeros(shape.layers, shape.kv_heads, scorer.n_features(shape.head_dim))
    for layer, window in enumerate(shape.windows):
        if window is not None:
            continue
        features, targets = [], []
        for context, importance in zip(contexts, demands, strict=True):
            keys, values = context.key_values(layer)
            positions = importance.positions.to(keys.device)
            features.append(scorer.features(keys[:, positions], values[:, positions]).cpu())
            targets.append(importance.attention[layer])
        x, y = torch.cat(features, 1).double(), torch.cat(targets, 1).double()
        if not (x.isfinite().all() and y.isfinite().all()):
            raise HeadsinkError("the model's attention is not finite here; try --dtype float32 or bfloat16")
        weights[layer] = _ridge(x, y)
    return weights


def _ridge(features: Tensor, targets: Tensor) -> Tensor:
    """Ridge regression without the intercept: [heads, samples, features] and targets [heads, samples] -> [heads, features]."""
    weight = (WEIGHT * targets).exp()
    weight = (weight / weight.sum(1, keepdim=True))[..., None]
    features = features - (weight * features).sum(1, keepdim=True)
    targets = targets - (weight[..., 0] * targets).sum(1, keepdim=True)
    weighted = (weight * features).transpose(-1, -2)
    gram = weighted @ features
    variance = gram.diagonal(dim1=-2, dim2=-1)
    gram = gram + torch.diag_embed(RIDGE * variance + 1e-6 * variance.mean(-1, keepdim=True))
    solution = torch.cholesky_solve(weighted @ targets[..., None], torch.linalg.cholesky(gram))[..., 0]
    weights = (solution / solution.abs().amax(-1, keepdim=True).clamp(min=1e-12)).float().round(decimals=4)
    weights[~weights.any(-1), 0] = 1.0  # a head that needs no key: any weights will do
    return weights
