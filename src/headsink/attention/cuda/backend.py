"""The GPU backend: kernels in Triton, in float32, bfloat16 and float16."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headsink.attention.cuda import decode, full, prefill
from headsink.attention.cuda import statistics as census
from headsink.attention.cuda.table import DeviceTable
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import KeyVisibility
from headsink.utils import device

ROWS = 64  # queries of a KV head up to which keys are read in place


class CUDABackend:
    """See `backends.Backend`."""

    reads_layers = True
    scorers = frozenset({"linear"})
    decodes_padding = True
    statistics: Any = census

    def supports(self, query: Tensor, params: AttentionParams) -> bool:
        return device.can_run(query)

    def is_decode_shape(self, query: Tensor, kv_heads: int) -> bool:
        return query.shape[2] * query.shape[1] <= ROWS * kv_heads

    def beats_sdpa(self, query: Tensor, kv_heads: int) -> bool:
        return self.is_decode_shape(query, kv_heads)

    def attend_full(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor | None:
        return full.attend(query, keys, values, scaling)

    def decode(
        self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, end: int, params: AttentionParams
    ) -> Tensor:
        return decode.attend_buffers(query.contiguous(), keys, values, visible, end, *params)[0]

    def prefill(
        self, query: Tensor, keys: Tensor, values: Tensor, visibility: KeyVisibility, params: AttentionParams
    ) -> Tensor:
        return prefill.attend(query, keys, values, visibility, *params)[0]

    def step(
        self, table: Any, length: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        if not isinstance(table.table, DeviceTable):
            table.table = DeviceTable.of(table, length, query.device)
        table.table.length.fill_(length)
        return table.table.attend(query, key, value, params)
