"""What a block of queries attends to, in torch: the numbers of attention/cuda/statistics.py for each query, from its weights.

A block (attention/chunked.py) has the attention weights of some queries over all keys. Sink tokens are taken out of it first, so
that what is left is divided by distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from headsink.attention.chunked import Block, attend, normaliser

TINY = torch.finfo(torch.float32).tiny


class SinkKeys:
    """The sink tokens of every KV head as indices, padded to the same number.

    flags: bool [KV heads, keys]. index: int [KV heads, most], ascending where `real`. first: number of initial tokens.
    """

    def __init__(self, flags: Tensor, first: int):
        self.flags = flags
        most = max(1, int(flags.sum(-1).max()))
        order = torch.arange(flags.shape[1], 0, -1, device=flags.device) * flags
        self.index = order.topk(most, dim=-1).indices
        self.real = flags.gather(1, self.index)
        self.opening = self.real & (self.index < first)

    def weights(self, part: Block) -> Tensor:
        """Attention to sink tokens in a block: [KV heads, group, queries, most]. Sets these weights of the block to 0."""
        _, queries, keys = part.weights.shape
        grouped = part.weights.view(len(self.flags), -1, queries, keys)
        index = self.index - part.begin
        inside = self.real & (index >= 0) & (index < keys)
        index = index.clamp(0, keys - 1)[:, None, None].expand(*grouped.shape[:3], -1)
        weights = grouped.gather(3, index) * inside[:, None, None]
        head, rank = inside.nonzero(as_tuple=True)
        grouped[head, :, :, (self.index - part.begin)[head, rank]] = 0
        return weights


def _near(part: Block, most: int) -> Tensor:
    """Indices in the block of the last `most` keys of every query, newest first: int [queries, most], negative outside."""
    ages = torch.arange(most, device=part.rows.device)
    return part.rows[:, None] - part.begin - ages


def _bands(part: Block, cuts: list[int]) -> Iterator[tuple[int, int, Tensor]]:
    """The weights between two successive distances: (distance, first key, weights [query heads, queries, keys]).

    With cuts [a, b, c]: keys a to b - 1 back, with distance b; then keys b to c - 1 back, with distance c. Other weights are 0.
    """
    rows, begin = part.rows, part.begin
    first, last = int(rows[0]), int(rows[-1])
    for low, high in pairwise(cuts):
        start, stop = max(begin, first - high + 1), max(begin, last - low + 1)
        age = rows[:, None] - torch.arange(start, stop, device=rows.device)
        yield high, start, part.weights[:, :, start - begin : stop - begin] * ((age >= low) & (age < high))


def masses(part: Block, sinks: SinkKeys, window: int, steps: list[int]) -> dict[str, Tensor]:
    """Masses and other scores for each query of a block: float32 [query heads, queries]. Overwrites the block's weights."""
    logits, weights, sink_logits = part.logits, part.weights, part.sink_logits
    real = 1 - sink_logits
    spread = torch.linalg.vecdot(weights, logits) / real
    entropy = (normaliser(logits, weights, real) - spread).clamp(min=0)
    first = weights[:, :, 0].clone() if part.begin == 0 else torch.zeros_like(sink_logits)
    at_sinks = sinks.weights(part)  # from here on `weights` has no sink tokens
    ages = part.rows[:, None] - sinks.index[:, None, None]  # of sink tokens: [KV heads, 1, queries, most]
    near = _near(part, window)
    others = weights.gather(2, near.clamp(min=0).expand(len(weights), -1, -1)) * (near >= 0)
    others = others.cumsum(-1)  # [query heads, queries, window], without sink tokens
    within = {step: others[:, :, step - 1] for step in steps if step <= window}
    local = others[:, :, -1]
    kept, peak = local, torch.zeros_like(sink_logits)
    for step, _, tile in _bands(part, [window, *(step for step in steps if step > window)]):
        if tile.shape[2]:
            kept = kept + tile.sum(-1)
            peak = torch.maximum(peak, tile.amax(-1))
        within[step] = kept
    profile = {
        f"within_{step}": mass + (at_sinks * (ages < step)).sum(-1).view_as(mass)  # weights of future keys are 0
        for step, mass in within.items()
    }
    return profile | {
        "first": first,
        "sink": at_sinks.sum(-1).view_as(local),
        "local": local,
        "far": kept - local,
        "far_peak": peak,
        "learned": sink_logits,
        "entropy": entropy,
        "effective": entropy.exp(),
    }


def pattern_outputs(part: Block, value: Tensor, sinks: SinkKeys, windows: list[int]) -> dict[str, Tensor]:
    """Outputs under every window for each query of a block: float32 [query heads, queries, dim]. Overwrites its weights."""
    heads, queries, _ = part.weights.shape
    sink_logits = part.sink_logits
    at_sinks = sinks.weights(part)  # [KV heads, group, queries, most]; from here on the block has no sink tokens
    ages = part.rows[:, None] - sinks.index[:, None, None]
    sink_values = value.gather(1, sinks.index[..., None].expand(-1, -1, value.shape[2]))[:, None]
    opening = at_sinks * sinks.opening[:, None, None]
    total = value.new_zeros(heads, queries, value.shape[2])  # weighted values of a window's keys, without sink tokens
    mass = torch.zeros_like(sink_logits)
    outputs = {}

    def record(window: int) -> None:
        close = opening + (at_sinks - opening) * (ages < window)
        for kept, tokens in (("first", close), ("secondary", at_sinks)):
            visible = (mass + tokens.sum(-1).view_as(mass) + sink_logits).clamp(min=TINY)
            outputs[f"{kept}_{window}"] = (total + (tokens @ sink_values).view_as(total)) / visible[..., None]

    record(0)
    for window, start, tile in _bands(part, windows):
        if tile.shape[2]:
            total, mass = total + attend(tile, start, value), mass + tile.sum(-1)
        record(window)
    return outputs


def first_and_all(part: Block) -> Tensor:
    """Attention to the first token and to all keys: float32 [2, query heads, queries]."""
    first = part.weights[:, :, 0]
    return torch.stack([first if part.begin == 0 else torch.zeros_like(first), 1 - part.sink_logits])
