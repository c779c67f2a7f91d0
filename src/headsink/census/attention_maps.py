"""Attention maps: which keys each query of a head attends to, over a whole text, in memory linear in its length.

A map never holds a number for every query and key. It has three parts, all computed from the queries and keys of one forward
pass in blocks (attention/chunked.py), from every query, without sampling:

- tiles: a text of n tokens is divided into runs of `tile` tokens, so that there are at most `rows` of them. A tile is the
  attention that the queries of one run give to all keys of another: the mean over the queries, the sum over the keys. A row of
  tiles sums to 1, less what a learned sink logit takes. Where a tile is one token, this is the attention matrix itself.
- mean: attention to each key, mean over the queries i >= n / 4, as in a census.
- top keys: the keys with most attention of every query, and their attention. Zoomed in, they show the map token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.chunked import blocks
from headsink.attention.interface import AttentionRecord, observe_attention
from headsink.census.head_statistics import first_row
from headsink.errors import HeadsinkError
from headsink.models.distributed import check_all_heads, input_device
from headsink.models.spec import Architecture, decoder, describe
from headsink.utils.format import ranges

Head = tuple[int, int]  # number of the layer in the model, and query head


@dataclass(frozen=True)
class Request:
    """What to read of some heads: at most `rows` rows of tiles, and the `top` keys with most attention of every query."""

    heads: Sequence[Head]
    rows: int
    top: int


@dataclass(frozen=True)
class PooledAttention:
    """Attention of some heads on a text of n tokens, all on the CPU.

    heads: layer and query head of each map. tile: tokens of a run. tiles: float32 [maps, rows, rows], queries x keys. mean:
    float32 [maps, n]. keys: int32 [maps, n, top], with most attention first, -1 where a query sees fewer keys. weights: float32
    [maps, n, top], 0 for these.
    """

    heads: tuple[Head, ...]
    tile: int
    tiles: Tensor
    mean: Tensor
    keys: Tensor
    weights: Tensor


def all_heads(shape: Architecture) -> list[Head]:
    """Every query head of a model."""
    return [(layer, head) for layer in shape.attending for head in range(shape.heads[layer][0])]


def check_heads(heads: Sequence[Head], shape: Architecture) -> None:
    """Raise for heads that a model does not have."""
    known = set(all_heads(shape))
    for layer, head in heads:
        if (layer, head) not in known:
            most = max(shape.heads[one][0] for one in shape.attending)
            raise HeadsinkError(
                f"heads: {layer}.{head} is not a head of {shape.name}, which has attention in layers {ranges(shape.attending)}, "
                f"with query heads 0 to {most - 1}"
            )


def tile_size(length: int, rows: int) -> int:
    """The smallest power of two so that `rows` tiles cover `length` tokens."""
    return 2 ** (-(-length // rows) - 1).bit_length()


def pooled_attention(model: PreTrainedModel, ids: Sequence[int], *requests: Request) -> list[PooledAttention]:
    """Read the attention of chosen heads on one text in one forward pass: a result for every request.

    ids: token ids of the text, with its special tokens. Raises HeadsinkError for heads that the model does not have, for a text
    over its maximum or under two tokens, and for a model that tensor parallelism splits.
    """
    shape = describe(model)
    shape.refuse("attention maps", "chunked_attention")
    if not 2 <= len(ids) <= shape.max_context:
        raise HeadsinkError(f"text: it has {len(ids)} tokens; give 2 to {shape.max_context}, which {shape.name} reads")
    for request in requests:
        check_heads(request.heads, shape)
    tiles = [tile_size(len(ids), request.rows) for request in requests]
    found: list[dict[Head, dict[str, Tensor]]] = [{} for _ in requests]

    def observe(seen: AttentionRecord) -> None:
        check_all_heads("attention maps", shape, seen.layer, seen.query.shape[1])
        for request, tile, maps in zip(requests, tiles, found, strict=True):
            heads = [head for layer, head in request.heads if layer == seen.layer]
            if heads:
                parts = _pool(seen, heads, tile, request.top)
                for n, head in enumerate(heads):
                    maps[seen.layer, head] = {name: part[n].cpu() for name, part in parts.items()}

    with torch.no_grad(), observe_attention(model, observe):
        decoder(model)(torch.tensor([list(ids)], device=input_device(model)), use_cache=False)
    return [_joined(request, tile, maps) for request, tile, maps in zip(requests, tiles, found, strict=True)]


def _joined(request: Request, tile: int, maps: dict[Head, dict[str, Tensor]]) -> PooledAttention:
    parts: Any = {name: torch.stack([maps[head][name] for head in request.heads]) for name in maps[request.heads[0]]}
    return PooledAttention(tuple(request.heads), tile, **parts)


def _pool(seen: AttentionRecord, heads: list[int], tile: int, top: int) -> dict[str, Tensor]:
    """The parts of the maps of some heads of a layer: [heads, ...]."""
    group = seen.query.shape[1] // seen.key.shape[1]
    own = replace(
        seen,
        query=seen.query[:, heads],
        key=seen.key[:, [head // group for head in heads]],
        sink_logits=None if seen.sink_logits is None else seen.sink_logits[heads],
    )
    length, device = own.length, own.key.device
    positions = torch.arange(length, device=device)
    counts = (positions // tile).bincount()  # queries of each run: the last may be shorter
    counted = (positions >= first_row(length)).float() / (length - first_row(length))
    tiles = torch.zeros(len(heads), len(counts), len(counts), device=device)
    mean = torch.zeros(len(heads), length, device=device)
    keys = torch.full((len(heads), length, top), -1, dtype=torch.int32, device=device)
    weights = torch.zeros(len(heads), length, top, device=device)
    for part in blocks(own):
        rows, begin, shares = part.rows, part.begin, part.weights  # [heads, queries, keys]
        size = shares.shape[2]
        mean[:, begin : begin + size] += counted[rows] @ shares
        before = begin % tile
        by_run = F.pad(shares, (before, -(before + size) % tile)).unflatten(2, (-1, tile)).sum(3)
        runs = slice(begin // tile, begin // tile + by_run.shape[2])
        tiles[:, :, runs].index_add_(1, rows // tile, by_run)
        most = min(top, size)
        if most:
            best, found = shares.topk(most)
            weights[:, rows, :most] = best
            keys[:, rows, :most] = torch.where(best > 0, found + begin, -1).int()
    return {"tiles": tiles / counts[:, None], "mean": mean, "keys": keys, "weights": weights}
