"""Exact attention of one whole text in blocks of queries. Memory is that of one block of logits and weights.

It supports what `sdpa` cannot express: sliding windows without a square mask (Gemma 3, Mistral), capped logits (Gemma 2) and a
learned sink logit (gpt-oss). The census computes its statistics from these blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headsink.attention.params import Inputs

BLOCK_ELEMENTS = 2**22  # approximate limit of the weights of a block: 16 MB of float32
MOST_ROWS = 128
HIDDEN = -1e30  # logit of an invisible key: its weight is exactly 0, and 0 x HIDDEN is 0, not NaN


class Block(NamedTuple):
    """A block of queries. `rows`: int [queries], ascending. `begin`: the first key of the block.

    logits, weights: float32 [query heads, queries, keys from `begin` to the last one that a query sees]. sink_logits: float32
    [query heads, queries], the attention weight of the sink logit, 0 without one. With it the weights of a query sum to 1.
    """

    rows: Tensor
    begin: int
    logits: Tensor
    weights: Tensor
    sink_logits: Tensor


def rows_per_block(heads: int, keys: int) -> int:
    """Return the number of queries of a block over `keys` keys: a power of two, so that smaller blocks divide larger ones."""
    return min(MOST_ROWS, max(1, 2 ** (BLOCK_ELEMENTS // max(1, heads * keys)).bit_length() // 2))


def block(inputs: Inputs, rows: Tensor) -> Block:
    """Return logits and weights of some queries. rows: int [queries], ascending positions in the text."""
    query, key = inputs.query[0], inputs.key[0]
    heads, _, dim = query.shape
    first, end = int(rows[0]), int(rows[-1]) + 1
    begin = 0 if inputs.sliding is None else max(0, first - inputs.sliding + 1)
    contiguous = end - first == len(rows)
    selected = (query[:, first:end] if contiguous else query[:, rows]).reshape(key.shape[0], -1, dim).float()
    logits = selected * inputs.scaling @ key[:, begin:end].float().transpose(1, 2)
    logits = logits.view(heads, len(rows), end - begin)
    if inputs.softcap is not None:
        logits = logits.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    columns = torch.arange(begin, end, device=rows.device)
    late = slice(first - begin + 1, end - begin)  # keys that are later than some query of the block
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
    """Return the log-sum-exp of every row of logits, from its weights = share x softmax: [..., keys] -> [...]."""
    return logits.amax(-1) - (weights.amax(-1) / share).log()


def blocks(inputs: Inputs) -> Iterator[Block]:
    """Yield all queries of the text in order, in blocks."""
    heads, length = inputs.query.shape[1:3]
    positions = torch.arange(length, device=inputs.query.device)
    start = 0
    while start < length:
        seen = start + MOST_ROWS if inputs.sliding is None else min(start, inputs.sliding) + MOST_ROWS
        rows = positions[start : start + rows_per_block(heads, seen)]
        yield block(inputs, rows)
        start += len(rows)


def attend(weights: Tensor, begin: int, value: Tensor) -> Tensor:
    """Return the output of some queries.

    weights: float32 [query heads, queries, keys from `begin` on]; value: [KV heads, tokens, dim]. Returns float32 [query heads,
    queries, dim].
    """
    heads, queries, keys = weights.shape
    output = weights.view(value.shape[0], -1, keys) @ value[:, begin : begin + keys].float()
    return output.view(heads, queries, value.shape[2])


def attention(inputs: Inputs) -> Tensor:
    """Return the attention of the whole text: [1, query heads, tokens, dim] in the query's dtype."""
    output = inputs.query.new_empty(*inputs.query.shape[:3], inputs.value.shape[3])
    for part in blocks(inputs):
        output[0, :, part.rows[0] : part.rows[-1] + 1] = attend(part.weights, part.begin, inputs.value[0]).to(
            output.dtype
        )
    return output
