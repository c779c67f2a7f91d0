"""Plans of windows, in the shapes of other methods: one knapsack over the squared errors of a few patterns.

The errors are measured with the full cache, by one forward pass per document (cached_document.py). Heads that a policy ties
together, over the layers or over tensor-parallel ranks, get the same pattern: their errors and sizes are added before the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headsink.calibration.allocation import SINK
from headsink.calibration.knapsack import choose
from headsink.calibration.method import Method
from headsink.eviction.pattern import FULL, Pattern
from headsink.models.distributed import rank_heads

WINDOWS = (32, 128, 512, 2048)  # of the policy headsink without top-k keys
ON_OFF = Pattern(64, 0, 256)  # of a streaming head in DuoAttention (arXiv 2410.10819)

Head = tuple[int, int]  # layer, KV head


def candidates(method: Method, context: int) -> tuple[Pattern, ...]:
    """The patterns that a head may get under a policy without top-k keys; full attention is the last."""
    if method.policy == "streaming-llm":
        return (Pattern(SINK, 0, 1), FULL)
    sizes = [Pattern(SINK, 0, window) for window in WINDOWS] if method.policy == "headsink" else [ON_OFF]
    return (*(pattern for pattern in sizes if pattern.size(context) < context), FULL)


def needs_errors(method: Method) -> bool:
    """Whether a policy without top-k keys chooses by errors."""
    return method.policy not in ("streaming-llm", "random")


def choose_patterns(
    method: Method, planned: Sequence[bool], errors: Tensor, context: int, budget: float, seed: int = 0
) -> list[list[Pattern] | None]:
    """The patterns of a policy without top-k keys, [layers][KV heads], None for a layer with a sliding window.

    planned: for every layer whether it is planned, that is without a sliding window. errors: float [layers, KV heads, options],
    squared error of each candidate; only its shape counts for policies that need no errors. context: tokens at which the budget
    holds. Raises HeadsinkError if even the smallest plan is over the budget.
    """
    kv_heads = errors.shape[1]
    rows: list[list[Pattern] | None] = [[FULL] * kv_heads if own else None for own in planned]
    if method.policy == "streaming-llm":
        window = int(budget * context) - SINK
        full = window + SINK >= context and method.positions == "absolute"
        return [row and [FULL if full else Pattern(SINK, 0, window)] * kv_heads for row in rows]
    if budget == 1:
        return rows
    options = candidates(method, context)
    tied = tied_heads(method, [layer for layer, own in enumerate(planned) if own], errors)
    sizes = len(tied[0]) * torch.tensor([pattern.size(context) for pattern in options], dtype=torch.float64)
    if method.policy == "random":
        order = torch.randperm(len(tied), generator=torch.Generator().manual_seed(seed))
        cost = torch.zeros(len(tied), len(options), dtype=torch.float64)
        cost[order, 0] = torch.arange(1, len(tied) + 1, dtype=torch.float64)
    else:
        counted = [heads[:1] if method.policy == "copy-first-layer" else heads for heads in tied]
        cost = torch.stack([torch.stack([errors[head] for head in heads]).double().sum(0) for heads in counted])
    pick = choose(cost, sizes, budget * context * sum(map(len, tied)))
    for heads, option in zip(tied, pick.tolist(), strict=True):
        for layer, head in heads:
            rows[layer][head] = options[option]  # type: ignore[index]
    return rows


def tied_heads(method: Method, layers: Sequence[int], errors: Tensor) -> list[list[Head]]:
    """Groups of equally many heads that get the same pattern.

    Single heads; or a layer's heads; or the heads at one index of all layers; or, with several ranks, the head with the largest
    error of each rank, then the next of each, and so on.
    """
    kv_heads = errors.shape[1]
    if method.policy == "layer-wise":
        return [[(layer, head) for head in range(kv_heads)] for layer in layers]
    if method.policy == "copy-first-layer":
        return [[(layer, head) for layer in layers] for head in range(kv_heads)]
    if method.ranks == 1:
        return [[(layer, head)] for layer in layers for head in range(kv_heads)]
    ranks = dict.fromkeys(tuple(heads) for heads in rank_heads(kv_heads, method.ranks))
    tied = []
    for layer in layers:
        worst = errors[layer, :, 0].tolist()
        ordered = [sorted(heads, key=lambda head: -worst[head]) for heads in ranks]
        tied += [[(layer, head) for head in same] for same in zip(*ordered, strict=True)]
    return tied
