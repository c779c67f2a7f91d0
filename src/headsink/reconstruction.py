"""The weights of keys' scores: fitted to how much a text needs each of its keys in order to be told again.

Spans of a document that the model has read are run after it once more, as if it was asked to repeat them. What such a span
looks at in the document is what a cache has to keep, whatever is asked later (KVzip, arXiv 2505.23416). The target for a key
of the span is the logarithm of the largest attention that it gets from any query of its KV head there. Ridge regression of
the targets on the features of the keys (scores.py), for every KV head by itself, gives a rule that scores keys of other texts
as they come. Keys that get more attention weigh more: what is far from being kept need not be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headsink.blockwise import Inputs
from headsink.errors import HeadsinkError
from headsink.replay import Branches, Replay
from headsink.scores import key_features, n_features

PROMPT = "\n\nRepeat the previous context exactly.\n\n"
LEAD, SPAN = 8, 128  # tokens before a span that tell where it begins; of a span
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


def demand(replay: Replay, tokenizer: PreTrainedTokenizerBase) -> Demand:
    """Tell spans of a document again."""
    prompt = list(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    document, shape = replay.document.ids, replay.shape
    starts = _starts(len(document))
    spans = [range(start, min(start + SPAN, len(document))) for start in starts]
    branches = Branches(
        [prompt + document[span.start - LEAD : span.stop] for span in spans], len(document), replay.model.device
    )
    found = torch.zeros(shape.layers, shape.kv_heads, sum(map(len, spans)))

    def attend(inputs: Inputs) -> Tensor:
        parts, got = [], []
        for rows, span in zip(branches.rows, spans, strict=True):
            output, attention = _attend(replay, inputs, rows, span)
            parts.append(output)
            got.append(attention)
        if inputs.sliding is None:
            found[inputs.layer] = torch.cat(got, -1).cpu()
        return torch.cat(parts, 2)

    with torch.no_grad():
        replay.run(branches, attend)
    return Demand(torch.tensor([position for span in spans for position in span]), found.clamp(min=LEAST))


def _starts(length: int) -> list[int]:
    """Where spans begin: side by side if the whole document may be told again, else at even distances."""
    if length - LEAD <= TOKENS:
        return list(range(LEAD, length, SPAN))
    room, count = length - LEAD - SPAN, TOKENS // SPAN
    return [LEAD + round(n * room / (count - 1)) for n in range(count)]


def _attend(replay: Replay, inputs: Inputs, rows: slice, span: range) -> tuple[Tensor, Tensor]:
    """Attention of one span, in full: its output [1, query heads, tokens, dim], and the log of the largest attention that
    each of its keys in the document got, [KV heads, keys] (meaningless in a layer that slides)."""
    keys, values = replay.held(inputs.layer)
    first = replay.length - keys.shape[1]
    heads, tokens = keys.shape[0], rows.stop - rows.start
    query = inputs.query[0, :, rows].unflatten(0, (heads, -1))  # [KV heads, group, tokens, dim]
    keys = torch.cat([keys.to(query.dtype), inputs.key[0, :, rows]], 1)
    values = torch.cat([values.to(query.dtype), inputs.value[0, :, rows]], 1)
    scores = (query.flatten(1, 2) @ keys.transpose(-1, -2)).float() * inputs.scaling
    columns = torch.arange(first, replay.length + tokens, device=keys.device)
    apart = torch.arange(replay.length, replay.length + tokens, device=keys.device)[:, None] - columns
    hidden = apart < 0 if inputs.sliding is None else (apart < 0) | (apart >= inputs.sliding)
    scores.masked_fill_(hidden.repeat(query.shape[1], 1), float("-inf"))
    scores -= scores.logsumexp(-1, keepdim=True)
    attention = scores[:, :, max(span.start - first, 0) : max(span.stop - first, 0)].amax(1)
    output = scores.exp_().to(values.dtype) @ values
    return output.unflatten(1, (-1, tokens)).flatten(0, 1)[None], attention


def fit(replays: Sequence[Replay], demands: Sequence[Demand]) -> Tensor:
    """Weights of keys' scores, float32 [layers, KV heads, features]; the largest of each head is 1, four decimals are kept."""
    shape = replays[0].shape
    weights = torch.zeros(shape.layers, shape.kv_heads, n_features(shape.head_dim))
    for layer, window in enumerate(shape.windows):
        if window is not None:
            continue
        features, targets = [], []
        for replay, told in zip(replays, demands, strict=True):
            keys, values = replay.held(layer)
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
