"""Which KV heads share a block table: few groups, for as few bytes as that takes.

vLLM hands out blocks of one size from one pool. Layers with the same kind of cache form groups of equally many layers, each
group with a block table of its own; what is missing in a group is padded with layers that do not exist. Here a "layer" is one
KV head of one layer of the model (a *unit*), since heads of a layer keep different keys. Every group costs time at every
step, so there should be few; a head that goes into a group of heads that keep more keeps more with them. `choose` finds the
groups that cost the fewest bytes with vLLM's own rule of padding, which `group_size` writes out.

In tensor parallelism vLLM wants the same kinds of cache on every rank. So the heads of a layer are put in order on each rank,
widest first, and the n-th unit of a layer keeps what the n-th heads of all ranks need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from headsink.eviction.pattern import Pattern
from headsink.models.distributed import rank_heads
from headsink.plan.plan import Plan
from headsink.serving.vllm.blocks import ALL, Blocks, union, widen

MOST_GROUPS = 8  # a group takes a block table, slots and metadata at every step: some 0.2 ms on a CPU


@dataclass(frozen=True)
class Grouping:
    """What each unit keeps, and the bytes of a text of `context` tokens, over all ranks' units of one rank.

    units: [layers][KV heads of a rank], None for a layer that slides by itself. full: without a plan. planned: what the plan
    says, to the token. used: what vLLM takes, in whole blocks and with padding.
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
            f"KV cache of a text of {self.context} tokens: {mib[2]} MiB used in {self.groups} groups, {mib[1]} MiB planned, "
            f"{mib[0]} MiB without a plan"
        )


def widest_first(patterns: Sequence[Pattern], heads: Sequence[int]) -> list[int]:
    """Indices into `heads`, of those that keep most first. Which unit runs which head of a rank."""

    def size(n: int) -> tuple[float, int]:
        pattern = patterns[heads[n]]
        return float("inf") if pattern.window is None else pattern.window + pattern.sink, pattern.sink

    return sorted(range(len(heads)), key=size, reverse=True)


def choose(
    plan: Plan, windows: Sequence[int | None], block: int, context: int, token_bytes: int, ranks: int
) -> Grouping:
    """The groups that hold a text of `context` tokens in the fewest bytes.

    windows: the model's own, per layer. block: tokens of a block. token_bytes: of a key and a value of one KV head.
    """
    rank = rank_heads(plan.model.kv_heads, ranks)
    places: list[tuple[int, int]] = []  # layer, unit
    needed: list[Blocks] = []
    planned = 0
    for layer, heads in enumerate(plan.layers):
        if heads is None:
            planned += len(rank[0]) * min(context, windows[layer] or context)
            continue
        patterns = [head.pattern for head in heads]
        planned += max(sum(patterns[head].size(context) for head in mine) for mine in rank)
        orders = [[mine[n] for n in widest_first(patterns, mine)] for mine in rank]
        for unit in range(len(rank[0])):
            places.append((layer, unit))
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
    for (layer, unit), found in zip(places, kept, strict=True):
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
    """Layers in each of vLLM's groups, from how many layers there are of each kind (vLLM 0.32, kv_cache_utils.py)."""
    return max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)


def _fewest_bytes(
    needed: list[Blocks], sliding: Counter[Blocks], block: int, context: int
) -> tuple[list[Blocks], int, int]:
    """What each unit keeps, how many groups that makes, and blocks times units of a text of `context` tokens.

    Units in order of what they need are cut into runs, and a run keeps what its widest needs. Tried are runs of every length
    that gives few enough groups, the rest at the narrow end on its own or spread over the last two or three runs (vLLM does
    not pad kinds that are much smaller than others: it makes smaller groups).
    """
    order = sorted(range(len(needed)), key=lambda n: (needed[n].held(context, block), needed[n].sink), reverse=True)
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
        cost = sum(count * size * kind.held(context, block) for kind, count in groups)
        few = number <= max(MOST_GROUPS, len(sliding) + 1)
        if (few or len(runs) == 1) and (best is None or (cost, number) < best[:2]):
            best = cost, number, kept
    assert best is not None
    return best[2], best[1], best[0]


def _cuts(units: int) -> list[list[int]]:
    """Lengths of runs to try."""
    found = []
    for length in range(-(-units // MOST_GROUPS), units + 1):
        whole, rest = divmod(units, length)
        if rest == 0:
            found.append([length] * whole)
            continue
        for last in (1, 2, 3):  # runs that share what is missing
            if last <= whole + 1:
                shared = (last - 1) * length + rest
                found.append([length] * (whole + 1 - last) + [(shared + n) // last for n in reversed(range(last))])
    return found
