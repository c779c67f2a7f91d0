"""The table of a layer's keys and values on a GPU (kv_table.py), and one token's attention through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headsink.attention.params import AttentionParams
from headsink.models.rope import rotate_back


@dataclass(frozen=True)
class DeviceTable:
    """Where the heads of a layer lie, for kernels of a GPU: the table of a `KVTable`, int64 [texts, KV heads, fields], and how
    many columns have come in, int64 [1]."""

    table: Tensor
    length: Tensor

    @classmethod
    def of(cls, table: Any, length: int, device: torch.device) -> DeviceTable:
        return cls(torch.from_numpy(table).to(device), torch.tensor([length], device=device))

    def rotated(self, query: Tensor, inverse: Tensor) -> Tensor:
        """The queries of a token as they look at the first tokens where positions are counted in the cache (rotary.py)."""
        from headsink.attention.kv_table import KVField

        places = self.length - self.table[..., KVField.PAD]  # [batch, heads]
        last = self.table[..., KVField.SINK] + self.table[..., KVField.WINDOW] - 1
        group = query.shape[1] // places.shape[1]
        back = (places - last).clamp(min=0).repeat_interleave(group, 1)
        return rotate_back(query, back[..., None], inverse).to(query.dtype)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, softmax: AttentionParams, rotated: Tensor | None = None
    ) -> Tensor:
        """Let a token of every text in, or several where nothing is let go, and attend from them.

        query, turned: [batch, heads x group, tokens, dim]; key, value: [batch, heads, tokens, dim]. The host waits for nothing.
        `length` stays what it is.
        """
        from headsink.attention.cuda.append import append_keys
        from headsink.attention.cuda.decode import attend

        append_keys(key.contiguous(), value.contiguous(), self.table, self.length)
        return attend(query.contiguous(), self.table, self.length, *softmax, rotated)[0]
