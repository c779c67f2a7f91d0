"""Attention of one whole text in blocks of queries: logits and weights of a block at a time, never an N x N matrix.

What `sdpa` cannot express is exact here: a sliding window without a square mask (Gemma 3, Mistral), capped logits (Gemma 2) and
a learned sink logit (gpt-oss). The census reads its statistics off these blocks; memory is that of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headsink.attention.params import Inputs

BLOCK_ELEMENTS = 2**22  # weights of a block at most, about: 16 MB of float32
MOST_ROWS = 128
HIDDEN = -1e30  # logit of a key that is not seen: its weight is exactly 0, and 0 x HIDDEN is still 0


class Block(NamedTuple):
    """A block of queries. `rows`: int [queries], ascending. `begin`: the first key of the block.

    logits, weights: float32 [query heads, queries, keys from `begin` to the last one that a query sees]. learned: float32 [query
    heads, queries], the attention that a learned logit takes, 0 where there is none; with it the weights of a query sum to 1.
    """

    rows: Tensor
    begin: int
    logits: Tensor
    weights: Tensor
    sink_logits: Tensor


def rows_per_block(heads: int, keys: int) -> int:
    """Queries of a block over so many keys: a power of two, so that blocks of neighbours fit into each other."""
    return min(MOST_ROWS, max(1, 2 ** (BLOCK_ELEMENTS // max(1, heads * keys)).bit_length() // 2))


def block(inputs: Inputs, rows: Tensor) -> Block:
    """Logits and weights of some queries; rows: int [queries], ascending positions in the text."""
    query, key = inputs.query[0], inputs.key[0]
    heads, _, dim = query.shape
    first, end = int(rows[0]), int(rows[-1]) + 1
    begin = 0 if inputs.sliding is None else max(0, first - inputs.sliding + 1)
    contiguous = end - first == len(rows)
    asked = (query[:, first:end] if contiguous else query[:, rows]).reshape(key.shape[0], -1, dim).float()
    logits = asked * inputs.scaling @ key[:, begin:end].float().transpose(1, 2)
    logits = logits.view(heads, len(rows), end - begin)
    if inputs.softcap is not None:
        logits = logits.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    columns = torch.arange(begin, end, device=rows.device)
    late = slice(first - begin + 1, end - begin)  # keys that some query of the block comes too early for
    logits[:, :, late].masked_fill_(columns[late] > rows[:, None], HIDDEN)
    if inputs.sliding is not None:
        old = slice(0, max(0, end - inputs.sliding - begin))  # keys that have left the window of some query
        logits[:, :, old].masked_fill_(rows[:, None] - columns[old] >= inputs.sliding, HIDDEN)
    weights = logits.softmax(-1)
    sink_logits = torch.zeros(heads, len(rows), device=rows.device)
    if inputs.sink_logits is not None:
        sink_logits = torch.sigmoid(inputs.sink_logits.float()[:, None] - normaliser(logits, weights))
        weights *= 1 - sink_logits[..., None]
    return Block(rows, begin, logits, weights, sink_logits)


def normaliser(logits: Tensor, weights: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """The log-sum-exp of every row of logits, from its softmax, of which the weights are a share: [..., keys] -> [...]."""
    return logits.amax(-1) - (weights.amax(-1) / share).log()


def blocks(inputs: Inputs) -> Iterator[Block]:
    """All queries of the text in order, in blocks of neighbours."""
    heads, length = inputs.query.shape[1:3]
    positions = torch.arange(length, device=inputs.query.device)
    start = 0
    while start < length:
        seen = start + MOST_ROWS if inputs.sliding is None else min(start, inputs.sliding) + MOST_ROWS
        rows = positions[start : start + rows_per_block(heads, seen)]
        yield block(inputs, rows)
        start += len(rows)


def attend(weights: Tensor, begin: int, value: Tensor) -> Tensor:
    """Output of some queries: weights float32 [query heads, queries, keys from `begin` on], value [KV heads, tokens, dim].

    Returns float32 [query heads, queries, dim].
    """
    heads, queries, keys = weights.shape
    output = weights.view(value.shape[0], -1, keys) @ value[:, begin : begin + keys].float()
    return output.view(heads, queries, value.shape[2])


def attention(inputs: Inputs) -> Tensor:
    """Attention of the whole text: [1, query heads, tokens, dim] in the query's dtype."""
    output = inputs.query.new_empty(*inputs.query.shape[:3], inputs.value.shape[3])
    for part in blocks(inputs):
        output[0, :, part.rows[0] : part.rows[-1] + 1] = attend(part.weights, part.begin, inputs.value[0]).to(
            output.dtype
        )
    return output
