"""DeviceTable: the KV table of a layer (attention/kv_table.py) on a GPU, and a decode step through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headsink.attention.params import AttentionParams
from headsink.models.rope import Rotary, rotate_back


@dataclass(frozen=True)
class DeviceTable:
    """The table of a `KVTable` on a GPU, int64 [sequences, KV heads, fields], and the number of columns so far, int64 [1].

    int8: whether the buffers are.
    """

    table: Tensor
    length: Tensor
    int8: bool

    @classmethod
    def of(cls, layout: Any, length: int, device: torch.device) -> DeviceTable:
        """layout: a `KVTable`."""
        columns = torch.tensor([length], device=device)
        return cls(torch.from_numpy(layout.table).to(device), columns, layout.dtypes[0] == torch.int8)

    def rotated(self, query: Tensor, rotary: Rotary) -> Tensor:
        """Return the queries of a token rotated for the sink tokens, for cache-relative positions (models/rope.py)."""
        from headsink.attention.kv_table import KVField

        positions = self.length - self.table[..., KVField.PAD]  # [batch, heads]
        last = self.table[..., KVField.SINK] + self.table[..., KVField.WINDOW] - 1
        group = query.shape[1] // positions.shape[1]
        distance = (positions - last).clamp(min=0).repeat_interleave(group, 1)
        return rotate_back(query, distance[..., None], rotary).to(query.dtype)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, softmax: AttentionParams, rotated: Tensor | None = None
    ) -> Tensor:
        """Append a token to every sequence, or several if no head evicts, and attend from them.

        query, rotated: [batch, heads x group, tokens, dim]; key, value: [batch, heads, tokens, dim]. Does not block the host and
        does not change `length`.
        """
        from headsink.attention.cuda.append import append_keys
        from headsink.attention.cuda.decode import attend

        append_keys(key.contiguous(), value.contiguous(), self.table, self.length, self.int8)
        return attend(query.contiguous(), self.table, self.length, *softmax, rotated, int8=self.int8)[0]
