"""The sequences of a batch while they grow, for the decoding loops of lossless mode (speculative.py, lookup.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headsink.cache.cache import PlanCache


@dataclass
class Speculation:
    """Counts of a lossless generation. drafted, accepted: tokens over all rows. passes: forward passes with the full cache,
    without the prefill. kv_bytes: of all caches at the end. lengths: drafted tokens per row in each pass."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    kv_bytes: int = 0
    lengths: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


class Sequences:
    """texts: each sequence so far, int64 [tokens]. rows: numbers of the unfinished ones. position: of the last token of each of
    these, int64 [rows], or [axes, rows] where positions have several axes. full: the full cache, with all tokens before it."""

    def __init__(self, input_ids: Tensor, position: Tensor, full: PlanCache):
        self.texts, self.position, self.full = list(input_ids), position, full
        self.rows = list(range(len(input_ids)))

    def append(self, row: int, new: list[int], stop: Any, streamer: Any) -> bool:
        """Append tokens to a sequence, up to the one that ends it. Returns whether it is unfinished."""
        text = self.rows[row]
        for token in new:
            self.texts[text] = torch.cat([self.texts[text], self.texts[text].new_tensor([token])])
            if streamer is not None:
                streamer.put(self.texts[text][-1:])
            if bool(stop(self.texts[text][None], None).all()):
                return False
        return True

    def drop(self, unfinished: list[bool], *caches: PlanCache) -> None:
        """Keep only unfinished rows, in the caches too."""
        remaining = [row for row, goes_on in enumerate(unfinished) if goes_on]
        self.rows = [self.rows[row] for row in remaining]
        if remaining and not all(unfinished):
            rows = torch.tensor(remaining, device=self.position.device)
            self.position = self.position[..., rows]
            for cache in caches:
                cache.batch_select_indices(rows)
