"""Prefixes that a server starts sequences from: what `headsink prefill` wrote, as the slab (slab.py) holds it.

A head holds of a prefix what its pattern keeps, which is less than what it keeps in the slab. So it evicts later than in a
sequence whose prompt was read: `missing` counts the difference. Nothing here imports vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headsink.errors import HeadsinkError
from headsink.eviction.scorers import NONE, SCORERS
from headsink.models.devices import dtype_name
from headsink.models.spec import Architecture
from headsink.plan.plan import Plan
from headsink.runtime.prefix import prefix_heads
from headsink.serving.vllm.fp8 import rounded
from headsink.serving.vllm.slab import Slab


@dataclass(frozen=True)
class Prefix:
    """A prefix on one rank.

    tokens: of the prefix. missing: how many of them each head does not hold, int64 [layers, KV heads]. place: int64 [keys, 3],
    layer, head and slot of every key. keys, values: [keys, dim]. scores: float32 [keys]. positions: int32 [keys].
    """

    tokens: int
    missing: Tensor
    place: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        plan: Plan,
        shape: Architecture,
        slab: Slab,
        heads: Sequence[int],
        dtype: torch.dtype,
        cache_dtype: str,
    ) -> Prefix:
        """heads, dtype: of the rank. cache_dtype: as for `rounded`. Raises HeadsinkError for files that cannot be served."""
        ids, layers = prefix_heads(path, plan, shape)
        if (given := layers[0][0].keys.dtype) != dtype:
            names = dtype_name(given), dtype_name(dtype)
            raise HeadsinkError(f"{path}: its keys and values are {names[0]}, the server's are {names[1]}")
        missing, places, scores, keys, values = torch.zeros_like(slab.keeps), [], [], [], []
        held = [(layer, at, row[head]) for layer, row in enumerate(layers) for at, head in enumerate(heads)]
        for layer, at, head in held:
            count = len(head.keys)
            if count > slab.keeps[layer, at]:
                raise HeadsinkError(f"{path}: it was saved while text was generated; save it after the prompt")
            missing[layer, at] = len(ids) - count
            places.append(torch.tensor([[layer, at, slot] for slot in range(count)]).view(count, 3))
            weights = plan.scores(layer)[heads[at]][None]
            keys.append(rounded(head.keys, cache_dtype))
            values.append(rounded(head.values, cache_dtype))
            linear = SCORERS[plan.scorer].scores(keys[-1][None], values[-1][None], weights)[0].float()
            scores.append(torch.where(head.scores == NONE, linear, head.scores))
        return cls(
            len(ids),
            missing,
            torch.cat(places),
            torch.cat(keys),
            torch.cat(values),
            torch.cat(scores),
            torch.cat([head.positions for *_, head in held]).int(),
        )


def find(prefixes: Sequence[Sequence[int]], prompt: Sequence[int]) -> int | None:
    """Return the number of the longest prefix that a prompt begins with and is longer than, None if there is none."""
    fitting = [n for n, ids in enumerate(prefixes) if len(ids) < len(prompt) and list(prompt[: len(ids)]) == list(ids)]
    return max(fitting, key=lambda n: len(prefixes[n]), default=None)
