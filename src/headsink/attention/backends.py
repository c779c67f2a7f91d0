"""Attention of grouped queries by torch, the compiled CPU kernels (attention/cpu) or the GPU kernels (attention/cuda).

All queries of a KV head are rows of one product, so each key and value is read once.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headsink.attention.cpu.threads import _after_fork, claim, compiled, turn
from headsink.attention.kv_table import check_buffers
from headsink.attention.params import AttentionParams, shares
from headsink.attention.visibility import KeyVisibility, check_sight
from headsink.errors import must_be
from headsink.utils import device

FEW = 3  # tokens up to which keys are read in place; for more, copying them to tiles first is faster
ROWS = 64  # the same limit on a GPU, in queries of a KV head


def few(query: Tensor, kv_heads: int) -> bool:
    """Whether keys are best read in place for this query, [batch, query heads, tokens, dim]."""
    if query.device.type in device.DEVICES:
        return query.shape[2] * query.shape[1] <= ROWS * kv_heads
    return query.shape[2] <= FEW


if sys.platform != "win32":  # which has no fork
    os.register_at_fork(after_in_child=_after_fork)


def can_run(tensor: Tensor, softmax: AttentionParams) -> bool:
    """Whether the kernels support this tensor. The CPU kernels support neither capped logits nor sink logits."""
    return device.can_run(tensor) or (
        softmax.plain
        and compiled()
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def attend_table(
    table: Any, query: Tensor, tokens: int, scaling: float, key: Tensor | None = None, value: Tensor | None = None
) -> Tensor:
    """Attend on a CPU over the heads of a table, int64 [batch x heads, len(KVField)].

    query: [batch, heads x group, tokens, dim]. key, value: [batch, heads, 1, dim], a token to append before; the dtype is that of
    the heads' buffers.
    """
    claim()  # before numba is imported: another thread may have been importing it when this process was forked
    from headsink.attention.cpu import decode

    batch, query_heads, _, dim = query.shape
    heads = len(table) // max(batch, 1)
    must_be("attention: rows of the table", len(table), batch * heads)
    must_be("attention: tokens and query heads left over", (query.shape[2], query_heads % max(heads, 1)), (tokens, 0))
    for token in (key, value):
        if token is not None:
            must_be("attention: a new token", (token.shape, token.dtype), ((batch, heads, 1, dim), query.dtype))
    rows = (query.detach().float() * scaling).reshape(len(table), -1, dim).contiguous()
    out = torch.empty_like(rows)
    none = rows.new_empty(0, dim)
    new = [none if t is None else t.detach().float().reshape(-1, dim).contiguous() for t in (key, value)]
    like: Any = np.empty(0, np.uint16 if query.dtype == torch.bfloat16 else np.float32)
    with turn() as threads:
        decode.attend(table, like, new[0].numpy(), new[1].numpy(), rows.numpy(), tokens, out.numpy(), threads)
    return out.view_as(query).to(query.dtype)


def attend_few(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, end: int, softmax: AttentionParams
) -> Tensor:
    """Attend from the last tokens over buffers up to slot `end`. The last slots are their own. Needs `can_run`.

    query: [batch, heads x group, tokens, dim]; keys, values: [batch, heads, slots, dim]; visible: bool [batch, heads, slots].
    """
    if query.device.type in device.DEVICES:
        from headsink.attention.cuda.decode import attend_buffers

        return attend_buffers(query.contiguous(), keys, values, visible, end, *softmax)[0]
    from headsink.attention.kv_table import KVField

    batch, heads, slots, dim = keys.shape
    check_buffers(query, keys, values, visible, end)
    keys, values, visible = (buffer.contiguous() for buffer in (keys, values, visible))

    table = np.zeros((batch * heads, len(KVField)), np.int64)
    number = np.arange(batch * heads) * slots
    for field, buffer in ((KVField.KEYS, keys), (KVField.VALUES, values)):
        table[:, field] = buffer.data_ptr() + number * dim * keys.element_size()
    table[:, KVField.VISIBLE] = visible.data_ptr() + number
    table[:, KVField.END] = end
    return attend_table(table, query, query.shape[2], softmax.scaling)


def attend_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sight: KeyVisibility,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend from many tokens, each over the keys that it sees. Needs `can_run`.

    query: [batch, heads x group, tokens, dim]; keys, values: [batch x heads, keys, dim]; other arguments: see `AttentionParams`.
    Returns zero where a query sees no key.
    """
    if query.device.type in device.DEVICES:
        from headsink.attention.cuda import prefill as on_gpu

        return on_gpu.attend(query, keys, values, sight, scaling, softcap, sink_logits)[0]
    check_sight(query, keys, values, sight)
    claim()
    from headsink.attention.cpu import prefill, tiles

    grouped = query.detach().contiguous().view(len(keys), -1, *query.shape[2:])
    out = torch.empty_like(grouped)
    pairs = tiles.PAIRED and query.dtype == torch.bfloat16 and query.shape[3] % 2 == 0
    work: Any = np.empty(0, np.uint16 if pairs else np.float32)
    columns: Any = np.arange(keys.shape[1], dtype=np.int32) + (sight.start - sight.prefix_slots)
    columns[: sight.prefix_slots] = -1
    with turn() as threads:
        prefill.attend(
            *(_numbers(t.detach().contiguous()) for t in (keys, values)),
            columns.astype(np.int32),
            sight.until.int().contiguous().numpy(),
            _numbers(grouped),
            sight.first,
            scaling,
            work,
            _numbers(out),
            threads,
        )
    return out.view_as(query)


def _numbers(tensor: Tensor) -> Any:
    """Return the tensor as a numpy array, with bfloat16 as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    softmax: AttentionParams,
    rotated: Tensor | None = None,
    sink: int = 0,
) -> Tensor:
    """Attend in torch from grouped queries, each over the keys of its KV head.

    query: [batch, heads x group, tokens, dim]; keys, values: [batch, heads, keys, dim]; mask: bool [batch, heads, tokens, keys],
    or [1, 1, tokens, keys] where `softmax` is not plain, or None. rotated: the queries for the first `sink` keys, if they differ.
    Returns zero where a query sees no key.
    """
    batch, heads, n_keys, dim = keys.shape
    if n_keys == 0:
        return torch.zeros_like(query)
    if rotated is not None or not softmax.plain:
        return _attend_by_logits(query, keys, values, mask, softmax, rotated, sink)
    tokens, group = query.shape[2], query.shape[1] // heads
    if tokens == 1:  # the heads of a group as queries, so a key is read once
        rows = query.reshape(batch, heads, group, dim)
        mask = None if mask is None else mask.expand(batch, heads, group, n_keys)
    else:  # the heads of a group share a mask
        rows = query.reshape(batch * heads, group, tokens, dim)
        keys, values = (t.reshape(batch * heads, 1, n_keys, dim).expand(-1, group, -1, -1) for t in (keys, values))
        mask = None if mask is None else mask.reshape(batch * heads, 1, tokens, n_keys)
    output = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=softmax.scaling)
    return output.view(batch, heads * group, tokens, dim)


def _attend_by_logits(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    softmax: AttentionParams,
    rotated: Tensor | None,
    sink: int,
) -> Tensor:
    """Compute what `sdpa` cannot express, with all logits in memory, in float32 or better."""
    batch, heads, n_keys, _ = keys.shape
    kind = torch.promote_types(query.dtype, torch.float32)

    def logits(of: Tensor, seen: Tensor) -> Tensor:
        rows = of.to(kind).reshape(batch, heads, -1, of.shape[3]) * softmax.scaling
        return rows @ seen.to(kind).transpose(-1, -2)

    scores = logits(query, keys)
    if rotated is not None:
        scores[..., :sink] = logits(rotated, keys[:, :, :sink])
    scores = softmax.capped(scores).view(batch, heads, -1, query.shape[2], n_keys)
    if mask is not None:
        scores = scores.masked_fill_(~mask[:, :, None], float("-inf"))
    sink_logits = None if softmax.sink_logits is None else softmax.sink_logits.view(heads, -1, 1, 1)
    weights = shares(scores, sink_logits).nan_to_num(0.0).flatten(2, 3)  # zero if no key is visible
    return (weights.to(values.dtype) @ values).view_as(query)
