"""The weights of keys' scores: fitted to how much a text needs each of its keys in order to be told again.

What spans of a document look at in it when they are told again (retelling.py) is what a cache has to keep. The target for a key
of the span is the logarithm of the largest attention that it gets from any query of its KV head there. Ridge regression of
the targets on the features of the keys (scores.py), for every KV head by itself, gives a rule that scores keys of other texts
as they come. Keys that get more attention weigh more: what is far from being kept need not be told apart.
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
from headsink.eviction.scoring import key_features, n_features

TOKENS = 1536  # of a document that are told again, at most, in spans at even distances
LEAST = -14.0  # of a target: below e^-14 no attention matters, and it may be 0
RIDGE = 1e-4  # of the variance of each feature
WEIGHT = 0.5  # exponent of a key's attention, its weight in the regression


@dataclass(frozen=True)
class Demand:
    """Keys of one document that were told again. positions: int64 [keys]; attention: float32 [layers, KV heads, keys],
    log of the largest that each got, 0 in layers that slide by themselves."""

    positions: Tensor
    attention: Tensor


def demand(context: Context, prompt: Sequence[int], whole: bool = False) -> Demand:
    """Tell spans of a document again, or the whole of it."""
    starts, shape = range(0, context.length, SPAN) if whole else _starts(context.length), context.shape
    spans = [range(start, min(start + SPAN, context.length)) for start in starts]
    telling = Reconstruction(context, prompt, spans)
    found = torch.zeros(shape.layers, shape.kv_heads, sum(map(len, spans)))

    def attend(inputs: Inputs) -> Tensor:
        outputs, largest = telling.attend(inputs)
        if inputs.sliding is None:
            found[inputs.layer] = largest.cpu()
        return outputs.flatten(0, 1)[None].to(inputs.query.dtype)

    with torch.no_grad():
        context.run(telling.continuations, attend)
    return Demand(torch.tensor([position for span in spans for position in span]), found.clamp(min=LEAST))


def _starts(length: int) -> list[int]:
    """Where spans begin: side by side if the whole document may be told again, else at even distances."""
    if length - LEAD <= TOKENS:
        return list(range(LEAD, length, SPAN))
    room, count = length - LEAD - SPAN, TOKENS // SPAN
    return [LEAD + round(n * room / (count - 1)) for n in range(count)]


def fit(contexts: Sequence[Context], demands: Sequence[Demand]) -> Tensor:
    """Weights of keys' scores, float32 [layers, KV heads, features]; the largest of each head is 1, four decimals are kept."""
    shape = contexts[0].shape
    weights = torch.zeros(shape.layers, shape.kv_heads, n_features(shape.head_dim))
    for layer, window in enumerate(shape.windows):
        if window is not None:
            continue
        features, targets = [], []
        for context, told in zip(contexts, demands, strict=True):
            keys, values = context.held(layer)
            places = told.positions.to(keys.device)
            features.append(key_features(keys[:, places], values[:, places]).cpu())
            targets.append(told.attention[layer])
        known, sought = torch.cat(features, 1).double(), torch.cat(targets, 1).double()
        if not (known.isfinite().all() and sought.isfinite().all()):
            raise HeadsinkError("the model's attention is not finite here; try --dtype float32 or bfloat16")
        weights[layer] = _ridge(known, sought)
    return weights


def _ridge(features: Tensor, targets: Tensor) -> Tensor:
    """features: [heads, samples, features], targets: [heads, samples]; the intercept is left out."""
    weight = (WEIGHT * targets).exp()
    weight = (weight / weight.sum(1, keepdim=True))[..., None]
    features = features - (weight * features).sum(1, keepdim=True)
    targets = targets - (weight[..., 0] * targets).sum(1, keepdim=True)
    weighted = (weight * features).transpose(-1, -2)
    gram = weighted @ features
    spread = gram.diagonal(dim1=-2, dim2=-1)
    gram = gram + torch.diag_embed(RIDGE * spread + 1e-6 * spread.mean(-1, keepdim=True))
    found = torch.cholesky_solve(weighted @ targets[..., None], torch.linalg.cholesky(gram))[..., 0]
    weights = (found / found.abs().amax(-1, keepdim=True).clamp(min=1e-12)).float().round(decimals=4)
    weights[~weights.any(-1), 0] = 1.0  # of a head that needs no key: any rule will do
    return weights
