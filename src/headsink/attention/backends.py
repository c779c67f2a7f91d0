"""Kernel backends: one protocol, chosen in one place. Where none supports a call, `eager.attend_rows` computes it in torch.

A new backend is a package with a class of this protocol, and a line in `backend_of`.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any, Protocol

from torch import Tensor

from headsink.attention.cpu.backend import CPUBackend
from headsink.attention.cpu.threads import after_fork
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import KeyVisibility
from headsink.utils import device

if sys.platform != "win32":  # where processes are not forked
    os.register_at_fork(after_in_child=after_fork)


class Backend(Protocol):
    """Attention of the KV heads of a layer by kernels for one kind of device.

    query: [batch, KV heads x group, tokens, dim] everywhere. reads_layers: whether all heads of a layer read a prompt in one
    launch (cache/prefill_cuda.py). scorers: names of the scorers that `step` computes (eviction/scorers). decodes_padding:
    whether `step` takes rows that hold nothing but padding so far. statistics: a module with the kernels of the census, or None.
    """

    reads_layers: bool
    scorers: frozenset[str]
    decodes_padding: bool
    statistics: Any

    def supports(self, query: Tensor, params: AttentionParams) -> bool:
        """Whether the kernels take tensors like this one."""

    def is_decode_shape(self, query: Tensor, kv_heads: int) -> bool:
        """Whether the tokens are so few that `decode` is faster than `prefill`."""

    def beats_sdpa(self, query: Tensor, kv_heads: int) -> bool:
        """Whether these kernels are faster than those of torch for causal attention to every key."""

    def attend_full(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor | None:
        """Causal attention to every key, [batch, KV heads, keys, dim]; None to leave it to torch."""

    def decode(
        self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, end: int, params: AttentionParams
    ) -> Tensor:
        """Attention of the last tokens over buffers up to slot `end`, the last of which are their own.

        keys, values: [batch, KV heads, slots, dim], or int8 [batch, KV heads, slots, dim + 4] (attention/int8.py); visible:
        bool [batch, KV heads, slots].
        """

    def prefill(
        self, query: Tensor, keys: Tensor, values: Tensor, visibility: KeyVisibility, params: AttentionParams
    ) -> Tensor:
        """Attention of many tokens, each over the keys that it sees; zero where it sees none.

        keys, values: [batch x KV heads, keys, dim].
        """

    def step(
        self, table: Any, length: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """Append one token of every row to all heads of a layer, evict what leaves, and attend.

        table: a `cache.kv_table.KVTable`. key, value: [batch, KV heads, 1, dim].
        """


def backend_for(query: Tensor, params: AttentionParams) -> Backend | None:
    """The backend that computes attention of these queries, or None for torch."""
    found = backend_of(query.device.type)
    return found if found is not None and found.supports(query, params) else None


def backend_of(kind: str) -> Backend | None:
    """The backend of a device type. On "cpu" it is the GPU's where a test runs its kernels by Triton's interpreter."""
    if kind in device.DEVICES and device.triton_installed():
        return _cuda()
    return _CPU if kind == "cpu" else None


_CPU = CPUBackend()


@cache
def _cuda() -> Backend:
    from headsink.attention.cuda.backend import CUDABackend  # needs triton

    return CUDABackend()
