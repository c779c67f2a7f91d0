"""Attention statistics of the heads of one layer on one text: sink, local and far attention, entropy, window errors, norms.

Statistics are means over the queries i0 <= i < n of a text of n tokens, with i0 = max(1, n // 4), because early queries see few
keys: the first one gives all attention to one key. If there are more than `queries` of them, about that many are sampled, evenly
spaced, and a quarter as many for the errors of windows; each is weighted by the number of queries since the previous one.
Attention is computed in blocks of queries (block_statistics.py) or in GPU kernels (attention/cuda/statistics.py), so memory is
O(n) per head. For every score, `uniform` is its value under flat attention over the visible keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from headsink.attention.backends import backend_for
from headsink.attention.chunked import block, rows_per_block
from headsink.attention.interface import AttentionRecord
from headsink.attention.output_norms import OutputNorms
from headsink.census import block_statistics
from headsink.census.block_statistics import TINY, SinkKeys
from headsink.census.options import QUERIES, TAU
from headsink.models.distributed import gather_heads

LEAST_WINDOW = 16  # the smallest window above 0 whose output error is measured
# relative value norms below which keys and their attention are counted
TAUS = tuple(round(0.1 * n, 1) for n in range(1, 11))


@dataclass(frozen=True)
class Thresholds:
    """Definition of sink tokens and local keys, stored with every result.

    first: number of initial tokens that are sink tokens. secondary: largest number of secondary sinks, keys with a value norm
    below `tau` times the head's median (docs/census.md explains the value); it must exceed the number in a long text. window:
    number of most recent keys that are local, including the query's own.
    """

    first: int = 4
    secondary: int = 1024
    tau: float = TAU
    window: int = 128

    def at(self, length: int) -> Thresholds:
        """Thresholds for a short text: at most 1/16 of it are initial tokens and at most 1/8 local keys."""
        near = 2 ** (max(1, length // 8).bit_length() - 1)
        return Thresholds(min(self.first, max(1, length // 16)), self.secondary, self.tau, min(self.window, near))


@dataclass
class HeadStatistics:
    """Statistics of one layer on one text of n tokens; all on the CPU.

    scores[name]: float64 [query heads] (see SCORES); uniform[name]: the same under flat attention. attention: float32 [query
    heads, n], mean attention to each key. profile: float64 [query heads, distances(n)], attention within 1, 2, 4, ... keys.
    errors[kept], group_errors[kept]: float64 [query heads or KV heads, windows(n)], mean squared output error of a head, or of a
    KV head's whole group, relative to the layer's output, when only a window and the initial tokens ("first"), or also the
    secondary sinks ("secondary"), are kept. tokens[name]: float64 [KV heads], see TOKENS. secondary: bool [KV heads, n].
    short_keys, short_attention: float64 [KV heads, taus], number of keys with a value norm below each of TAUS and the attention
    to them, without initial tokens.
    """

    scores: dict[str, Tensor]
    uniform: dict[str, Tensor]
    attention: Tensor
    profile: Tensor
    errors: dict[str, Tensor]
    group_errors: dict[str, Tensor]
    tokens: dict[str, Tensor]
    secondary: Tensor
    short_keys: Tensor
    short_attention: Tensor

    def joined(self, query_heads: int, kv_heads: int) -> HeadStatistics:
        """Statistics of all heads of the layer, gathered from tensor-parallel processes."""
        return self._map(lambda of, by_kv_head: gather_heads(of, kv_heads if by_kv_head else query_heads))

    def repeated(self, times: int) -> HeadStatistics:
        """Statistics in which every KV head stands `times` times, for a layer with fewer KV heads than others."""
        return self._map(lambda of, by_kv_head: of.repeat_interleave(times, 0) if by_kv_head and times > 1 else of)

    def _map(self, change: Callable[[Tensor, bool], Tensor]) -> HeadStatistics:
        """Change every tensor. change: also gets whether the tensor has a row per KV head."""
        by_kv_head = {"group_errors", "tokens", "secondary", "short_keys", "short_attention"}

        def changed(name: str) -> Any:
            value = getattr(self, name)
            if isinstance(value, dict):
                return {key: change(tensor, name in by_kv_head) for key, tensor in value.items()}
            return change(value, name in by_kv_head)

        return HeadStatistics(**{field.name: changed(field.name) for field in fields(self)})


SCORES = {
    "first": "attention to the first token",
    "sink": "attention to sink tokens: initial tokens and secondary sinks",
    "local": "attention to the most recent keys, without sink tokens",
    "far": "attention to all other keys",
    "far_peak": "attention to the strongest far key",
    "learned": "attention to the learned sink logit",
    "entropy": "entropy of the attention, nats",
    "effective": "effective number of keys: the exponential of the entropy",
    "legacy": "column 0 of the attention matrix over the whole matrix, including row 0",
    "output": "norm of the head's output relative to the layer's",
}
TOKENS = {
    "value_norm": "median value norm",
    "first_value": "value norm of the first token relative to the mean",
    "first_key": "key norm of the first token relative to the mean",
    "secondary_count": "secondary sinks",
    "secondary_value": "value norm of the secondary sinks relative to the mean",
    "secondary_key": "key norm of the secondary sinks relative to the mean",
}
KEPT = ("first", "secondary")


def distances(length: int) -> list[int]:
    """1, 2, 4, ... up to the smallest power of two that is at least `length`."""
    return [2**k for k in range((length - 1).bit_length() + 1)]


def distance_within(profile: Tensor, quantile: float, length: int) -> Tensor:
    """Distance that contains a share of the attention to keys: float64, [..., distances] -> [...].

    Interpolated linearly between measured distances; the query's own key has distance 1.
    """
    steps = torch.tensor(distances(length), dtype=torch.float64)
    target = quantile * profile[..., -1:]
    above = (profile < target).sum(-1, keepdim=True).clamp(1, len(steps) - 1)
    low, high = profile.gather(-1, above - 1), profile.gather(-1, above)
    share = ((target - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (steps[above - 1] + share * (steps[above] - steps[above - 1]))[..., 0]


def windows(length: int) -> list[int]:
    """The windows whose error is measured: 0, then 16, 32, ... below `length`."""
    return [0, *(d for d in distances(length) if LEAST_WINDOW <= d < length)]


def first_row(length: int) -> int:
    """The first query that is included at this length."""
    return min(max(1, length // 4), length - 1)


def sample_queries(first: int, end: int, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` of the queries first <= i < end, evenly spaced and including the last, and their weights in the mean.

    The weight of a query is proportional to the number of queries since the previous one. Weights are float64 and sum to 1.
    """
    rows = torch.arange(end - 1, first - 1, (first - end) // most).flip(0)
    weights = torch.diff(rows, prepend=torch.tensor([first - 1])).double()
    return rows, weights / weights.sum()


def head_statistics(seen: AttentionRecord, length: int, limits: Thresholds, queries: int = QUERIES) -> HeadStatistics:
    """Statistics of one layer on the first `length` tokens of its inputs. queries: largest number of sampled queries."""
    inputs, limits = seen.prefix(length), limits.at(length)
    key, value, output = inputs.key[0].float(), inputs.value[0].float(), inputs.output[0]
    (n_heads, _, dim), kv_heads, device = output.shape, key.shape[0], key.device
    norms = OutputNorms(seen.module, kv_heads, dim)
    positions = torch.arange(length, device=device)
    value_norm, key_norm = value.norm(dim=-1), key.norm(dim=-1)
    median = value_norm.median(-1).values
    short = value_norm < limits.tau * median[:, None]
    secondary = short & (positions >= limits.first)
    secondary &= secondary.cumsum(-1) <= limits.secondary  # if there are too many, the first ones
    sinks = SinkKeys(secondary | (positions < limits.first), limits.first)

    backend = backend_for(inputs.key, inputs.params)
    fused = backend.statistics if backend else None  # in few launches what blocks do in many
    size = QUERIES if fused else rows_per_block(n_heads, length)
    attention = torch.zeros(n_heads, length, device=device)

    def mean_over(
        first: int, end: int, most: int, read: Callable[[Tensor, Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Weighted means over queries of what `read` computes for blocks of queries and weights: float64 [...], on the CPU."""
        rows, share = (t.to(device) for t in sample_queries(first, end, most))
        parts = [read(r, w) for r, w in zip(rows.split(size), share.split(size), strict=True)]
        return {name: (torch.cat([part[name] for part in parts], -1).double() @ share).cpu() for name in parts[0]}

    def masses(rows: Tensor, share: Tensor) -> dict[str, Tensor]:
        if fused:
            sums, columns = fused.masses(inputs, rows, share, sinks.flags, limits.window, distances(length))
            attention.add_(columns)
        else:
            part = block(inputs, rows)
            attention[:, part.begin : part.begin + part.weights.shape[2]] += share.float() @ part.weights
            sums = block_statistics.masses(part, sinks, limits.window, distances(length))
        layer = norms.layer(output[:, rows]).clamp(min=TINY)
        return sums | {"output": (norms.heads(output[:, rows]) / layer).sqrt()}

    def errors(rows: Tensor, _: Tensor) -> dict[str, Tensor]:
        if fused:
            outputs = fused.pattern_outputs(inputs, rows, sinks.flags, limits.first, windows(length))
        else:
            outputs = block_statistics.pattern_outputs(block(inputs, rows), value, sinks, windows(length))
        return _errors(outputs, output[:, rows], norms)

    def first_and_all(rows: Tensor, _: Tensor) -> dict[str, Tensor]:
        return {
            "both": fused.first_and_all(inputs, rows) if fused else block_statistics.first_and_all(block(inputs, rows))
        }

    start = first_row(length)
    means = mean_over(start, length, queries, masses)
    window_errors = mean_over(start, length, max(1, queries // 4), errors)
    early = mean_over(0, start, max(1, queries // 4), first_and_all)["both"]
    late = torch.stack([means["first"], 1 - means["learned"]])
    scores = {name: means[name] for name in SCORES if name != "legacy"}
    of_column, of_matrix = early * start + late * (length - start)
    scores["legacy"] = of_column / of_matrix
    tokens = _sink_norms(value_norm, key_norm, median, secondary)
    taus = torch.tensor(TAUS, device=device)[:, None]
    below = (value_norm[:, None] < taus * median[:, None, None]) & (positions >= limits.first)  # [KV heads, taus, keys]
    by_group = attention.view(kv_heads, -1, length).mean(1)
    return HeadStatistics(
        scores={name: scores[name] for name in SCORES},
        uniform=_uniform(sinks.flags.repeat_interleave(n_heads // kv_heads, 0), length, limits, seen.sliding),
        attention=attention.cpu(),
        profile=torch.stack([means[f"within_{d}"] for d in distances(length)], -1),
        errors={kept: torch.stack([window_errors[f"{kept}_{w}"] for w in windows(length)], -1) for kept in KEPT},
        group_errors={
            kept: torch.stack([window_errors[f"{kept}_{w}_group"] for w in windows(length)], -1) for kept in KEPT
        },
        tokens={name: number.double().cpu() for name, number in tokens.items()},
        secondary=secondary.cpu(),
        short_keys=below.sum(-1).double().cpu(),
        short_attention=(below * by_group[:, None]).sum(-1).double().cpu(),
    )


def _sink_norms(value_norm: Tensor, key_norm: Tensor, median: Tensor, secondary: Tensor) -> dict[str, Tensor]:
    """The statistics TOKENS of each KV head: norms of values and keys of sinks, relative to the mean."""
    mean_value, mean_key, count = value_norm.mean(-1), key_norm.mean(-1), secondary.sum(-1)
    return {
        "value_norm": median,
        "first_value": value_norm[:, 0] / mean_value,
        "first_key": key_norm[:, 0] / mean_key,
        "secondary_count": count,
        "secondary_value": (value_norm * secondary).sum(-1) / count / mean_value,
        "secondary_key": (key_norm * secondary).sum(-1) / count / mean_key,
    }


def _errors(outputs: dict[str, Tensor], full: Tensor, norms: OutputNorms) -> dict[str, Tensor]:
    """Output errors of every window for each query: float32 [query or KV heads, queries].

    outputs, full: [query heads, queries, dim], under each window and with all keys.
    """
    layer = norms.layer(full).clamp(min=TINY)
    # one large product is faster than many small ones
    errors = torch.cat([full - output for output in outputs.values()], 1)
    sizes = {"": norms.heads(errors), "_group": norms.groups(errors)}
    return {
        name + suffix: of_window / layer
        for suffix, size in sizes.items()
        for name, of_window in zip(outputs, size.split(full.shape[1], -1), strict=True)
    }


def _uniform(sinks: Tensor, length: int, limits: Thresholds, sliding: int | None) -> dict[str, Tensor]:
    """Scores of flat attention over the visible keys, mean over all queries. sinks: bool [query heads, keys]."""
    n_heads = sinks.shape[0]
    row = torch.arange(length, device=sinks.device)
    low = torch.zeros_like(row) if sliding is None else (row - sliding + 1).clamp(min=0)  # first visible key
    counted = torch.nn.functional.pad(sinks.long().cumsum(-1), (1, 0))
    visible = (row + 1 - low).double()
    near_from = torch.maximum(low, row - limits.window + 1)
    sink = (counted[:, row + 1] - counted[:, low]) / visible
    local = ((row + 1 - near_from) - (counted[:, row + 1] - counted[:, near_from])) / visible
    far = 1 - sink - local
    flat = {
        "first": (low == 0) / visible,
        "sink": sink,
        "local": local,
        "far": far,
        "far_peak": (far > 1e-12) / visible,
        "learned": torch.zeros_like(visible),
        "entropy": visible.log(),
        "effective": visible,
        "legacy": (low == 0) / visible,
    }
    return {
        name: scores[..., 0 if name == "legacy" else first_row(length) :].mean(-1).expand(n_heads).cpu()
        for name, scores in flat.items()
    }
