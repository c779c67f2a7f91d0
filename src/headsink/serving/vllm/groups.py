"""Group KV heads that share a block table: few groups, with the fewest bytes.

vLLM allocates blocks of one size from one pool. Layers with the same cache spec form groups of equally many layers, and each
group has its own block table; incomplete groups are padded with virtual layers. Here vLLM's "layer" is one KV head of a layer of
the model, a *unit*, because the heads of a layer keep different keys. Every group costs time at every step, so groups should be
few. Each head keeps what the widest head of its group keeps. `choose` finds the groups that take the fewest bytes under vLLM's
padding rule (`group_size`).

With tensor parallelism vLLM needs the same cache specs on every rank. On each rank the heads of a layer are sorted, widest first,
and the n-th unit of a layer keeps what the n-th heads of all ranks need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from headsink.eviction.pattern import Pattern
from headsink.models.distributed import rank_heads
from headsink.plan.plan import Plan
from headsink.serving.vllm.blocks import ALL, Blocks, union, widen

MOST_GROUPS = 8  # a group's block table, slots and metadata take about 0.2 ms per step on a CPU


@dataclass(frozen=True)
class Grouping:
    """The blocks that each unit keeps, and the bytes per rank of a sequence of `context` tokens.

    units: [layers][KV heads of a rank]; None for a sliding-window layer of the model. full: bytes without a plan. planned: bytes
    of the plan's keys. used: bytes that vLLM takes, in whole blocks and with padding.
    """

    units: tuple[tuple[Blocks, ...] | None, ...]
    groups: int
    context: int
    full: int
    planned: int
    used: int

    def __str__(self) -> str:
        mib = [f"{size / 2**20:.1f}" for size in (self.full, self.planned, self.used)]
        return (
            f"KV cache of a sequence of {self.context} tokens: {mib[2]} MiB used in {self.groups} groups, {mib[1]} MiB planned, "
            f"{mib[0]} MiB without a plan"
        )


def widest_first(patterns: Sequence[Pattern], heads: Sequence[int]) -> list[int]:
    """Return indices into `heads`, widest pattern first: unit n runs the n-th of them."""

    def size(n: int) -> tuple[float, int]:
        pattern = patterns[heads[n]]
        return float("inf") if pattern.window is None else pattern.window + pattern.sink, pattern.sink

    return sorted(range(len(heads)), key=size, reverse=True)


def choose(
    plan: Plan, windows: Sequence[int | None], block: int, context: int, token_bytes: int, ranks: int
) -> Grouping:
    """Choose the groups that take the fewest bytes for a sequence of `context` tokens.

    windows: the model's sliding window per layer, or None. block: tokens per block. token_bytes: bytes of a key and a value of
    one KV head. ranks: tensor-parallel size.
    """
    rank = rank_heads(plan.model.kv_heads, ranks)
    unit_of: list[tuple[int, int]] = []  # (layer, unit) of each entry of `needed`
    needed: list[Blocks] = []
    planned = 0
    for layer, heads in enumerate(plan.layers):
        if heads is None:
            planned += len(rank[0]) * min(context, windows[layer] or context)
            continue
        patterns = [head.pattern.widen(plan.decode_window) for head in heads]
        planned += max(sum(patterns[head].size(context) for head in mine) for mine in rank)
        orders = [[mine[n] for n in widest_first(patterns, mine)] for mine in rank]
        for unit in range(len(rank[0])):
            unit_of.append((layer, unit))
            needed.append(union(widen(patterns[order[unit]], block) for order in orders))
    sliding = Counter(
        {
            widen(Pattern(window=window), block): len(rank[0]) * windows.count(window)
            for window in set(windows)
            if window is not None
        }
    )
    kept, groups, blocks = _fewest_bytes(needed, sliding, block, context)
    units: list[list[Blocks] | None] = [None if heads is None else [ALL] * len(rank[0]) for heads in plan.layers]
    for (layer, unit), found in zip(unit_of, kept, strict=True):
        row = units[layer]
        assert row is not None
        row[unit] = found
    return Grouping(
        units=tuple(None if row is None else tuple(row) for row in units),
        groups=groups,
        context=context,
        full=len(rank[0]) * len(plan.layers) * context * token_bytes,
        planned=planned * token_bytes,
        used=blocks * block * token_bytes,
    )


def group_size(sizes: Sequence[int]) -> int:
    """Return the number of layers per group, from the number of layers of each spec (vLLM's `get_kv_cache_groups`)."""
    return max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)


def _fewest_bytes(
    needed: list[Blocks], sliding: Counter[Blocks], block: int, context: int
) -> tuple[list[Blocks], int, int]:
    """Return the blocks that each unit keeps, the number of groups, and the blocks of a sequence summed over units.

    Units are sorted by the blocks they need and cut into runs; every unit of a run keeps what its widest unit needs. Run lengths
    that give few enough groups are tried, with the remainder at the narrow end as one run or spread over the last two or three.
    (vLLM does not pad specs with far fewer layers than others: it makes smaller groups.)
    """
    order = sorted(
        range(len(needed)), key=lambda n: (needed[n].cached_tokens(context, block), needed[n].sink), reverse=True
    )
    if not needed:
        return [], 0, 0
    best: tuple[int, int, list[Blocks]] | None = None
    for runs in _cuts(len(needed)):
        kept, start = [ALL] * len(needed), 0
        for length in runs:
            run = order[start : start + length]
            found = union(needed[n] for n in run)
            for n in run:
                kept[n] = found
            start += length
        kinds = list(Counter(kept).items()) + list(sliding.items())
        size = group_size([count for _, count in kinds])
        groups = [(kind, -(-count // size)) for kind, count in kinds]
        number = sum(count for _, count in groups)
        cost = sum(count * size * kind.cached_tokens(context, block) for kind, count in groups)
        few = number <= max(MOST_GROUPS, len(sliding) + 1)
        if (few or len(runs) == 1) and (best is None or (cost, number) < best[:2]):
            best = cost, number, kept
    assert best is not None
    return best[2], best[1], best[0]


def _cuts(units: int) -> list[list[int]]:
    """Return the lists of run lengths to try."""
    found = []
    for length in range(-(-units // MOST_GROUPS), units + 1):
        whole, rest = divmod(units, length)
        if rest == 0:
            found.append([length] * whole)
            continue
        for last in (1, 2, 3):  # number of last runs that share the remainder
            if last <= whole + 1:
                shared = (last - 1) * length + rest
                found.append([length] * (whole + 1 - last) + [(shared + n) // last for n in reversed(range(last))])
    return found
