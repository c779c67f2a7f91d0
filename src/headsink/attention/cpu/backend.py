"""The CPU backend: kernels compiled by numba, for models in float32 and bfloat16 and the formats of attention/formats.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headsink.attention.cpu.threads import claim, exclusive_threads, numba_installed
from headsink.attention.kv_table import KVField, check_buffers
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import KeyVisibility, check_sight
from headsink.errors import must_be

NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
}  # as kernels read
MATRIX_UNITS = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())  # which torch uses in bfloat16
FEW = 3  # tokens up to which keys are read in place; for more, copying them to tiles first is faster


class CPUBackend:
    """See `backends.Backend`. Logits are neither capped nor shared with sink logits."""

    reads_layers = False
    scorers = frozenset({"linear"})
    decodes_padding = False
    statistics: Any = None

    def supports(self, query: Tensor, params: AttentionParams) -> bool:
        return (
            params.plain
            and numba_installed()
            and query.dtype in (torch.float32, torch.bfloat16)
            and not (query.requires_grad and torch.is_grad_enabled())
        )

    def is_decode_shape(self, query: Tensor, kv_heads: int) -> bool:
        return query.shape[2] <= FEW

    def beats_sdpa(self, query: Tensor, kv_heads: int) -> bool:
        """False in bfloat16 on a processor with matrix units (AMX): torch uses them, and reads prompts three times as fast."""
        return not (query.dtype == torch.bfloat16 and MATRIX_UNITS)

    def attend_full(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor | None:
        return None

    def decode(
        self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, end: int, params: AttentionParams
    ) -> Tensor:

        batch, heads, slots, _ = keys.shape
        check_buffers(query, keys, values, visible, end)
        keys, values, visible = (buffer.contiguous() for buffer in (keys, values, visible))

        table = np.zeros((batch * heads, len(KVField)), np.int64)
        number = np.arange(batch * heads) * slots
        for field, buffer in ((KVField.KEYS, keys), (KVField.VALUES, values)):
            table[:, field] = buffer.data_ptr() + number * buffer.shape[3] * buffer.element_size()
        table[:, KVField.VISIBLE] = visible.data_ptr() + number
        table[:, KVField.END] = end
        return attend_table(table, (keys.dtype, values.dtype), query, query.shape[2], params.scaling)

    def prefill(
        self, query: Tensor, keys: Tensor, values: Tensor, visibility: KeyVisibility, params: AttentionParams
    ) -> Tensor:
        check_sight(query, keys, values, visibility)
        claim()
        from headsink.attention.cpu import prefill, tiles

        grouped = query.detach().contiguous().view(len(keys), -1, *query.shape[2:])
        out = torch.empty_like(grouped)
        pairs = tiles.PAIRED and query.dtype == torch.bfloat16 and query.shape[3] % 2 == 0
        work: Any = np.empty(0, np.uint16 if pairs else np.float32)
        columns: Any = np.arange(keys.shape[1], dtype=np.int32) + (visibility.start - visibility.prefix_slots)
        columns[: visibility.prefix_slots] = -1
        with exclusive_threads() as threads:
            prefill.attend(
                *(_numbers(t.detach().contiguous()) for t in (keys, values)),
                columns.astype(np.int32),
                visibility.until.int().contiguous().numpy(),
                _numbers(grouped),
                visibility.first,
                params.scaling,
                work,
                _numbers(out),
                threads,
            )
        return out.view_as(query)

    def step(
        self, table: Any, length: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        found = table.at(length)
        return attend_table(found.reshape(-1, found.shape[-1]), table.dtypes, query, 1, params.scaling, key, value)


def attend_table(
    table: Any,
    dtypes: tuple[torch.dtype, torch.dtype],
    query: Tensor,
    tokens: int,
    scaling: float,
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """Attend on a CPU over the heads of a table, int64 [batch x heads, len(KVField)].

    dtypes: of the heads' buffers of keys and of values. query: [batch, heads x group, tokens, dim]. key, value: [batch, heads, 1,
    dim], a token to append before.
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
    likes = [np.empty(0, NUMPY[dtype]) for dtype in dtypes]
    with exclusive_threads() as threads:
        decode.attend(table, *likes, new[0].numpy(), new[1].numpy(), rows.numpy(), tokens, out.numpy(), threads)
    return out.view_as(query).to(query.dtype)


def _numbers(tensor: Tensor) -> Any:
    """As numpy has it: bfloat16 as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
