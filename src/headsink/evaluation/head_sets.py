"""Sets of heads: read from names or pairs, drawn at random, and turned into query heads."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from operator import index
from typing import Literal

from headsink.errors import HeadsinkError
from headsink.evaluation.options import head_names
from headsink.models.spec import Architecture

HeadSet = tuple[tuple[int, int], ...]  # sorted pairs of layer and head
Null = Literal["layers", "all"]


def _pairs(heads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    try:
        return [(index(layer), index(head)) for layer, head in heads]
    except (TypeError, ValueError) as error:
        raise HeadsinkError(
            "heads: give pairs of layer and head, such as [(3, 2), (5, 0)], or text such as 3.2,5.*"
        ) from error


def names(heads: HeadSet) -> str:
    """Return a set of heads as `Heads.read` takes it: "3.2,5.0"."""
    return ",".join(f"{layer}.{head}" for layer, head in heads)


class Heads:
    """The query heads, or the KV heads, of all layers with attention. counts: {layer: number of heads}."""

    def __init__(self, shape: Architecture, kv_heads: bool):
        self.shape, self.kv_heads = shape, kv_heads
        self.counts = {layer: shape.heads[layer][kv_heads] for layer in shape.attending}

    def read(self, heads: str | Iterable[tuple[int, int]]) -> HeadSet:
        """Return a set of heads given as "3.2,5.*" or as pairs of layer and head. Raises HeadsinkError for unknown heads."""
        what, found = "KV heads" if self.kv_heads else "query heads", set()
        for layer, head in head_names(heads) if isinstance(heads, str) else _pairs(heads):
            if layer not in self.counts:
                raise HeadsinkError(
                    f"heads: layer {layer} has no attention; the model has {self.shape.layers} layers, from 0"
                )
            if head is not None and not 0 <= head < self.counts[layer]:
                raise HeadsinkError(
                    f"heads: {layer}.{head} is not there; layer {layer} has {self.counts[layer]} {what}, from 0"
                )
            found |= {(layer, one) for one in (range(self.counts[layer]) if head is None else (head,))}
        if not found:
            raise HeadsinkError("heads: none are given; give heads such as 3.2,5.* or pairs of layer and head")
        return tuple(sorted(found))

    def draw(self, like: HeadSet, null: Null, count: int, seed: int) -> list[HeadSet]:
        """Return `count` random sets of as many heads as `like`, from all layers, or as many from each layer as `like` has.

        Raises HeadsinkError if there is only one such set.
        """
        if not count:
            return []
        every = [(layer, head) for layer, heads in self.counts.items() for head in range(heads)]
        pools = [(every, len(like))]
        if null == "layers":
            layers = Counter(layer for layer, _ in like)
            pools = [([one for one in every if one[0] == layer], number) for layer, number in layers.items()]
        if all(len(pool) == number for pool, number in pools):
            right = "0 as draws" if len(like) == len(every) else "'all' as null"
            raise HeadsinkError(
                f"null: all heads of the layers are chosen, so random heads of the same layers are the same heads; give {right}"
            )
        rng = random.Random(f"ablation {seed}")
        return [tuple(sorted(one for pool, n in pools for one in rng.sample(pool, n))) for _ in range(count)]

    def query_heads(self, heads: HeadSet) -> dict[int, list[int]]:
        """Return the query heads of a set by layer; those of a KV head are its group."""
        found: dict[int, list[int]] = {}
        for layer, head in heads:
            query_heads, kv_heads, _ = self.shape.heads[layer]
            group = query_heads // kv_heads if self.kv_heads else 1
            found.setdefault(layer, []).extend(range(head * group, (head + 1) * group))
        return found
