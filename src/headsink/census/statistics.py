"""What the heads of one layer look at: section 4 of the design, in blocks of queries, never an N x N matrix.

A block of queries sees all its keys, so its softmax is complete and every statistic is a sum over rows. Rows of
attention do not depend on what follows them: a prefix of a text *is* the shorter text, so one pass gives all lengths.

For a length n the mean runs over queries i0 <= i < n with i0 = max(1, n // 4): the first query sees one key and must give
it everything. Beside each score stands `uniform`: what flat attention over the visible keys would give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from headsink.attention import Seen
from headsink.output import OutputNorms
from headsink.pattern import Pattern, floating_sinks

QUERY_BLOCK = 128
HIDDEN = -1e30  # logit of a key that is not seen: its weight is exactly 0, and 0 x HIDDEN is still 0


@dataclass(frozen=True)
class Thresholds:
    """What counts as a sink token and as near: kept with every result.

    first: first tokens that are sink tokens. floating: floating sinks at most, those with a value norm below `tau` of the
    head's median. window: the last keys that are local, the query's own among them.
    """

    first: int = 4
    floating: int = 16
    tau: float = 0.4
    window: int = 128


@dataclass
class LayerStatistics:
    """Statistics of one layer on one text.

    scores[name]: float64 [lengths, query heads] (see SCORES), uniform[name]: the same for flat attention.
    attention: float32 [lengths, query heads, keys], the mean attention to each key. profile: float64 [lengths, query heads,
    distances], the attention that stays within distances 1, 2, 4, ... keys back. errors[pattern]: float64 [lengths, KV heads],
    mean squared relative output error. sinks[name]: float64 [KV heads], see SINK_TOKENS. floating: per KV head, the
    positions of its floating sinks in the longest text.
    """

    scores: dict[str, Tensor]
    uniform: dict[str, Tensor]
    attention: Tensor
    profile: Tensor
    errors: dict[str, Tensor]
    sinks: dict[str, Tensor]
    floating: list[list[int]] = field(default_factory=list)


SCORES = {
    "first": "attention to the first token",
    "sink": "attention to sink tokens: the first ones and the floating sinks",
    "local": "attention to the last keys, sink tokens not counted",
    "far": "attention to the rest",
    "far_peak": "attention to the one far key that gets most of it",
    "entropy": "entropy of the attention, nats",
    "effective": "effective number of keys: the exponential of the entropy",
    "legacy": "column 0 of the attention matrix over the whole matrix, row 0 counted",
    "output": "norm of the head's output relative to the layer's",
}
SINK_TOKENS = {
    "value_norm": "median value norm",
    "first_value": "value norm of the first token relative to the mean",
    "first_key": "key norm of the first token relative to the mean",
    "floating_count": "floating sinks",
    "floating_value": "value norm of the floating sinks relative to the mean",
    "floating_key": "key norm of the floating sinks relative to the mean",
}


def distances(length: int) -> Tensor:
    """1, 2, 4, ... up to the first power of two that is not below `length`."""
    return 2 ** torch.arange((length - 1).bit_length() + 1)


def first_row(length: int) -> int:
    """The first query that counts at this length."""
    return min(max(1, length // 4), length - 1)


def layer_statistics(seen: Seen, lengths: list[int], limits: Thresholds, sliding: int | None = None) -> LayerStatistics:
    """Statistics of one layer for a text (batch of one) at each of `lengths`, the longest being the whole text.

    sliding: the layer's own window, None if it sees all.
    """
    query, key, value, output = (t[0].float() for t in (seen.query, seen.key, seen.value, seen.output))
    n_heads, length, dim = query.shape
    kv_heads = key.shape[0]
    group = n_heads // kv_heads
    norms = OutputNorms(seen.module, kv_heads, dim)
    columns = torch.arange(length, device=query.device)

    value_norm, key_norm = value.norm(dim=-1), key.norm(dim=-1)
    median = value_norm.median(-1).values
    floating = floating_sinks(
        Pattern(limits.first, limits.floating, 0), value_norm < limits.tau * median[:, None], columns
    )
    firsts = (columns < limits.first).expand(kv_heads, -1)
    sinks = floating | firsts

    rows_of = torch.tensor([[first_row(n), n] for n in lengths], device=query.device)
    sums = {name: torch.zeros(len(lengths), n_heads, dtype=torch.float64, device=query.device) for name in SCORES}
    attention = torch.zeros(n_heads, len(lengths), length, device=query.device)
    steps = distances(length).to(query.device)
    profile = torch.zeros(len(lengths), n_heads, len(steps), dtype=torch.float64, device=query.device)
    streaming = {"first": firsts, "floating": sinks}
    errors = {name: torch.zeros(len(lengths), kv_heads, dtype=torch.float64, device=query.device) for name in streaming}

    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        begin = 0 if sliding is None else max(0, start - sliding + 1)
        rows, keys = columns[start:end], columns[begin:end]
        distance = rows[:, None] - keys  # [rows, keys]
        hidden = distance < 0 if sliding is None else (distance < 0) | (distance >= sliding)
        logits = query[:, start:end].reshape(kv_heads, -1, dim) @ key[:, begin:end].transpose(-1, -2) * seen.scaling
        logits = logits.view(n_heads, end - start, -1).masked_fill_(hidden, HIDDEN)
        weights = logits.softmax(-1)

        chosen = ((rows >= rows_of[:, :1]) & (rows < rows_of[:, 1:])).double()  # [lengths, rows]
        chosen /= (rows_of[:, 1:] - rows_of[:, :1]).double()
        counted = (rows < rows_of[:, 1:]).double() / rows_of[:, 1:]

        first = weights[:, :, 0].clone() if begin == 0 else torch.zeros_like(weights[:, :, 0])
        # -sum p log p, where log p = logit - normaliser: spares a logarithm for every key
        normaliser = logits.amax(-1) - weights.amax(-1).log()
        entropy = (normaliser - (weights * logits).sum(-1)).clamp(min=0)
        full = output[:, start:end]
        layer = norms.layer(full).clamp(min=torch.finfo(torch.float32).tiny)
        near = (distance >= 0) & (distance < limits.window)  # [rows, keys]
        span = slice(max(0, int(start - limits.window + 1 - begin)), end - begin)  # keys that are near for some row
        masses = {}
        for name, flags in streaming.items():
            sink_mass, local_mass, numerator = _streaming(
                weights, value[:, begin:end], flags[:, begin:end], near, span, group
            )
            masses[name] = sink_mass, local_mass
            kept = (sink_mass + local_mass).clamp(min=torch.finfo(torch.float32).tiny)
            error = norms.groups(full - numerator / kept[..., None]) / layer
            errors[name] += chosen @ error.double().T
        sink_mass, local_mass = masses["floating"]
        row_scores = {
            "first": first,
            "sink": sink_mass,
            "local": local_mass,
            "far": (1 - sink_mass - local_mass).clamp(min=0),
            "entropy": entropy,
            "effective": entropy.exp(),
            "output": (norms.heads(full) / layer).sqrt(),
        }
        attention[:, :, begin:end] += chosen.float() @ weights
        profile += torch.einsum("lr,hrd->lhd", chosen, _within(weights, distance, steps).double())
        weights.masked_fill_(sinks[:, begin:end].repeat_interleave(group, 0)[:, None], 0)
        weights[:, :, span].masked_fill_(near[:, span], 0)
        row_scores["far_peak"] = weights.amax(-1)
        for name, scores in row_scores.items():
            sums[name] += chosen @ scores.double().T
        sums["legacy"] += counted @ first.double().T

    uniform = _uniform(sinks.repeat_interleave(group, 0), lengths, limits, sliding)
    mean_value, mean_key = value_norm.mean(-1), key_norm.mean(-1)
    count = floating.sum(-1)
    tokens = {
        "value_norm": median,
        "first_value": value_norm[:, 0] / mean_value,
        "first_key": key_norm[:, 0] / mean_key,
        "floating_count": count,
        "floating_value": (value_norm * floating).sum(-1) / count / mean_value,
        "floating_key": (key_norm * floating).sum(-1) / count / mean_key,
    }
    return LayerStatistics(
        scores={name: scores.cpu() for name, scores in sums.items()},
        uniform=uniform,
        attention=attention.transpose(0, 1).cpu(),
        profile=profile.cpu(),
        errors={name: error.cpu() for name, error in errors.items()},
        sinks={name: value.double().cpu() for name, value in tokens.items()},
        floating=[flags.nonzero()[:, 0].tolist() for flags in floating],
    )


def _streaming(
    weights: Tensor, value: Tensor, flags: Tensor, near: Tensor, span: slice, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sink mass, local mass [query heads, rows], and the sum over both kinds of weight x value [query heads, rows, dim].

    weights: [query heads, rows, keys]; flags: bool [KV heads, keys], sink tokens; near: bool [rows, keys], of which only
    the columns `span` can be True. Touches the near columns and the few sink columns, not the square.
    """
    kv_heads = value.shape[0]
    most = max(int(flags.sum(-1).max()), 1)
    index = flags.float().topk(most, dim=-1).indices  # [KV heads, most], sink tokens first
    real = flags.gather(1, index)
    grouped = weights.view(kv_heads, group, *weights.shape[1:])
    at_sinks = grouped.gather(3, index[:, None, None].expand(*grouped.shape[:3], most)) * real[:, None, None]
    at_near = grouped[..., span] * (near[:, span] & ~flags[:, None, span])[:, None]
    values_at_sinks = value.gather(1, index[..., None].expand(-1, -1, value.shape[2]))
    numerator = at_sinks @ values_at_sinks[:, None] + at_near @ value[:, None, span]
    return at_sinks.sum(-1).flatten(0, 1), at_near.sum(-1).flatten(0, 1), numerator.flatten(0, 1)


def _within(weights: Tensor, distance: Tensor, steps: Tensor) -> Tensor:
    """The attention of each row within 1, 2, 4, ... keys back: [query heads, rows, distances]."""
    cumulative = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))  # [.., k] = sum of the first k keys
    own = distance[:, 0] + 1  # keys of the block up to the row's own
    before = (own[:, None] - steps).clamp(min=0).expand(weights.shape[0], -1, -1)
    return cumulative.gather(2, own[:, None].expand_as(before)) - cumulative.gather(2, before)


def _uniform(sinks: Tensor, lengths: list[int], limits: Thresholds, sliding: int | None) -> dict[str, Tensor]:
    """The scores of flat attention over the visible keys; sinks: bool [query heads, keys]."""
    n_heads, length = sinks.shape
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
        "entropy": visible.log(),
        "effective": visible,
        "legacy": (low == 0) / visible,
    }
    result = {}
    for name, scores in flat.items():
        scores = scores.expand(n_heads, -1)
        rows = [(0 if name == "legacy" else first_row(n), n) for n in lengths]
        result[name] = torch.stack([scores[:, a:b].mean(-1) for a, b in rows]).cpu()
    return result
