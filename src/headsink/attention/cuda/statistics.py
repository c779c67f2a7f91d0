"""Statistics of the census (census/head_statistics.py) on a GPU, from sums over bands of keys (bands.py).

The attention in a window, to the first token and to far keys are sums over bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headsink.attention.cuda.bands import LN2, SampledQueries
from headsink.attention.params import Inputs

TINY = torch.finfo(torch.float32).tiny


def masses(
    inputs: Inputs, rows: Tensor, share: Tensor, sinks: Tensor, window: int, steps: Sequence[int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the masses of census/head_statistics.py, {name: float32 [query heads, queries]}, and the attention to each key.

    rows: int [queries], ascending positions. share: [queries], the weight of each query in the attention to each key, float32
    [query heads, keys]. sinks: bool [KV heads, keys]. window: number of local keys. steps: distances, the last beyond every
    key.
    """
    sampled = SampledQueries(inputs, rows)
    cuts = sampled.cuts([window, *steps])
    bands = sampled.bands(cuts)
    found = sampled.sums([*bands, sampled.start(1)], len(bands), sinks)
    others, at_sinks = found.weights[..., :-1, 0], found.weights[..., :-1, 1]
    near = cuts.index(window)
    within = (others + at_sinks).cumsum(-1)
    entropy = ((found.logarithm - found.spread) * LN2).clamp(min=0)
    named = {f"within_{step}": within[..., cuts.index(step) - 1] for step in steps} | {
        "first": found.weights[..., -1, :].sum(-1),
        "sink": at_sinks.sum(-1),
        "local": others[..., :near].sum(-1),
        "far": others[..., near:].sum(-1),
        "far_peak": torch.nn.functional.pad(found.peaks[..., near:-1], (0, 1)).amax(-1),
        "learned": found.sink_logits,
        "entropy": entropy,
        "effective": entropy.exp(),
    }
    return {name: sampled.by_head(mass) for name, mass in named.items()}, sampled.columns(found, share.float())


def first_and_all(inputs: Inputs, rows: Tensor) -> Tensor:
    """Return the attention to the first token and to all keys, per query: float32 [2, query heads, queries]."""
    sampled = SampledQueries(inputs, rows)
    none = torch.zeros(sampled.key.shape[:2], dtype=torch.bool, device=sampled.key.device)
    bands = sampled.bands(sampled.cuts([]))
    found = sampled.sums([*bands, sampled.start(1)], len(bands), none)
    return torch.stack([sampled.by_head(mass) for mass in (found.weights[..., -1, 0], 1 - found.sink_logits)])


def pattern_outputs(
    inputs: Inputs, rows: Tensor, sinks: Tensor, opening: int, windows: Sequence[int]
) -> dict[str, Tensor]:
    """Return the output of every head over some of the keys: {name: float32 [query heads, queries, dim]}.

    "first_16": the last 16 keys and the `opening` initial tokens. "secondary_16": these and all sink keys. windows: 0, then
    ascending.
    """
    sampled = SampledQueries(inputs, rows)
    cuts = sampled.cuts(windows)
    bands = sampled.bands(cuts, opening)
    found = sampled.sums([*bands, sampled.start(opening)], len(bands) + 1, sinks, values=True)
    # The sum of weights is appended as a coordinate, to normalise the others at the end.
    every = torch.cat([found.vectors, found.weights[..., None]], -1)  # [KV heads, rows, bands, 2, dim + 1]
    others, at_sinks, first = every[:, :, :-1, 0], every[:, :, :-1, 1], every[:, :, -1:].sum(-2)

    def before(bands: Tensor) -> Tensor:
        """Return the sum over the bands before each band."""
        return torch.nn.functional.pad(bands.cumsum(2), (0, 0, 1, 0))[:, :, :-1]

    near = {
        "first": before(others + at_sinks) + first,
        "secondary": before(others) + at_sinks.sum(2, keepdim=True) + first,
    }
    outputs = {}
    for window in windows:
        for name, sums in near.items():
            sum_ = sums[:, :, cuts.index(window)]
            mass = sum_[..., -1:] + found.sink_logits[..., None]  # including the weight of the sink logit
            outputs[f"{name}_{window}"] = sampled.by_head(sum_[..., :-1] / mass.clamp(min=TINY))
    return outputs
