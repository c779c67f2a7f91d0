"""Triton kernel for `lifetimes.batched_lifetimes`: the eviction step of all keys of all heads in parallel.

A key is cached while fewer than top_k better keys have left the window, so its eviction step is that of the top_k-th better
key. A table counts, for every block of ranks, the better keys before every block of positions. The kernel finds the block that
contains the top_k-th better key by bisection, and counts within two blocks to find the exact step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headsink.errors import must_be

BLOCK = 128  # keys
NEVER = 2**31 - 1


@triton.jit
def _find(order, ranks, table, found, keys, limits, blocks, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """For each key of one block of ranks, count the keys up to and including the `top_k`-th better one.

    order: [rows, keys], the key of each rank. ranks: [rows, keys]. table: [rows, blocks, blocks + 1], by rank and by key.
    limits: [rows], `top_k`.
    """
    own, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top_k = tl.load(limits + row)
    order, ranks, found = order + row * keys, ranks + row * keys, found + row * keys
    table += (row * blocks + own) * (blocks + 1)
    some = tl.arange(0, BLOCK)
    rank = own * BLOCK + some
    key = tl.load(order + rank, rank < keys, other=2147483647)
    better = some[None, :] < some[:, None]  # in this block
    low, high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + blocks + 1
    for _ in range(STEPS):  # the count is below `top_k` at low, but not at high
        middle = (low + high) // 2
        count = tl.load(table + middle, middle <= blocks, other=0)
        count += tl.sum((better & (key[None, :] < (middle * BLOCK)[:, None])).to(tl.int32), 1)
        enough = (count >= top_k) | (middle > blocks)
        low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
    count = tl.load(table + low) + tl.sum((better & (key[None, :] < (low * BLOCK)[:, None])).to(tl.int32), 1)
    index = (low * BLOCK)[:, None] + some[None, :]
    others = tl.load(ranks + index, index < keys, other=2147483647)
    count = count[:, None] + tl.cumsum((others < rank[:, None]).to(tl.int32), 1)
    after = low * BLOCK + 1 + tl.sum((count < top_k).to(tl.int32), 1)
    tl.store(found + key, tl.where(high > blocks, 2147483647, after), rank < keys)


def better_ones(scores: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """For each key, count the keys of its row up to and including the `top_k`-th better one.

    A key is better if its score is higher, or equal and later. scores: [rows, keys]; top_k: int64 [rows], 1 or more. Returns
    int32 [rows, keys], NEVER where there are fewer better keys, and the keys of each row, ordered by descending score: int64
    [rows, keys].
    """
    rows, keys = scores.shape
    must_be("lifetimes: numbers of keys", (tuple(top_k.shape), top_k.device), ((rows,), scores.device))
    blocks = triton.cdiv(keys, BLOCK)
    order = scores.argsort(stable=True).flip(-1)
    number = torch.arange(keys, dtype=torch.int32, device=scores.device)
    ranks = torch.empty(rows, keys, dtype=torch.int32, device=scores.device).scatter_(1, order, number.expand(rows, -1))
    index = (ranks // BLOCK + 1).long() * (blocks + 1) + number // BLOCK + 1
    table = torch.zeros(rows, (blocks + 1) * (blocks + 1), dtype=torch.int32, device=scores.device)
    table.scatter_add_(1, index, torch.ones_like(ranks))
    table = table.view(rows, blocks + 1, blocks + 1).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    found = torch.empty_like(ranks)
    with torch.cuda.device_of(scores):
        _find[(blocks, rows)](
            order.int(),
            ranks,
            table[:, :blocks].contiguous(),
            found,
            keys,
            top_k.contiguous(),
            blocks,
            STEPS=(blocks + 1).bit_length(),
            BLOCK=BLOCK,
            num_warps=16,
        )
    return found, order
