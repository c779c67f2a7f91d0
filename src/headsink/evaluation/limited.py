"""Run a model while some query heads see only the keys of a pattern, or are replaced by their mean output.

Every query is limited, those of the document too, so later layers read what the limited heads wrote. Nothing is cached or
evicted: the top-k keys of a pattern are those that the query itself attends to most, which is the best that any importance score
could choose. A document and its continuations run as one text in one forward pass, in which every continuation sees the document
and itself; in models whose positions or states do not allow that, each continuation has a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.eager import attend_rows
from headsink.attention.interface import AttentionRecord, observe_attention, replace_attention
from headsink.attention.params import QUERY_BLOCK, AttentionParams, Inputs
from headsink.compression.continuations import Continuations
from headsink.data.documents import Document
from headsink.eviction.pattern import FULL, Pattern
from headsink.models.distributed import check_all_heads, input_device
from headsink.models.spec import decoder, describe


@dataclass(frozen=True)
class Limit:
    """What some heads are limited to.

    heads: query heads by layer. output: instead of a pattern, the output of all heads of a layer for every token, by layer: float
    [query heads, dim].
    """

    heads: Mapping[int, Sequence[int]] = field(default_factory=dict)
    pattern: Pattern = FULL
    output: Mapping[int, Tensor] | None = None


class LimitedText:
    """A document and some of its continuations as one text.

    ids, positions: int64 [tokens]. branch: int64 [tokens], 0 for the document, else the number of the continuation, from 1.
    scored: int64, the tokens whose predictions are scored. counts: how many of them each continuation has.
    """

    def __init__(
        self, document: Sequence[int], continuations: Sequence[tuple[str, list[int], int]], device: torch.device
    ):
        length = len(document)
        after = Continuations([ids for _, ids, _ in continuations], length, device)
        self.ids = torch.cat([torch.tensor(document, device=device), after.ids])
        self.positions = torch.cat([torch.arange(length, device=device), after.positions])
        self.branch = torch.zeros_like(self.ids)
        for number, rows in enumerate(after.rows, 1):
            self.branch[length:][rows] = number
        self._cached: dict[tuple[int | None, Pattern], list[tuple[slice, Tensor, Tensor]]] = {}
        self.counts = [count for *_, count in continuations]
        ends = [length + rows.stop - 1 for rows in after.rows]  # predictions are made at the token before
        self.scored = torch.cat(
            [torch.arange(end - count, end, device=device) for end, count in zip(ends, self.counts, strict=True)]
        )

    def attend(self, inputs: Inputs, limit: Limit) -> Tensor:
        """Attention of a layer, [1, query heads, tokens, dim]."""
        output, limited = torch.empty_like(inputs.query), list(limit.heads.get(inputs.layer, ()))
        free = [head for head in range(output.shape[1]) if head not in limited]
        sets = [(free, FULL)] if limit.output is not None else [(free, FULL), (limited, limit.pattern)]
        group = output.shape[1] // inputs.key.shape[1]
        for heads, pattern in ((heads, pattern) for heads, pattern in sets if heads):
            query, own = inputs.query[:, heads], [head // group for head in heads]
            key, value = inputs.key[:, own], inputs.value[:, own]
            sink_logits = None if inputs.sink_logits is None else inputs.sink_logits[heads]
            softmax = AttentionParams(inputs.scaling, inputs.softcap, sink_logits)
            for rows, near, far in self._masks(inputs.sliding, pattern):
                queries, keys, values = query[:, :, rows], key[:, :, : rows.stop], value[:, :, : rows.stop]
                mask = near.expand(1, len(heads), -1, -1)
                if pattern.top_k:
                    mask = mask | _strongest(queries, keys, far, pattern.top_k)
                output[:, heads, rows] = attend_rows(queries, keys, values, mask, softmax)
        if limit.output is not None and limited:
            output[0, limited] = limit.output[inputs.layer][limited][:, None].to(output)
        return output

    def _masks(self, sliding: int | None, pattern: Pattern) -> list[tuple[slice, Tensor, Tensor]]:
        """For each block of queries: which keys up to its end are in sink or window, and which others are visible.

        bool [queries, keys] each. sliding: the layer's own window.
        """
        if (sliding, pattern) not in self._cached:
            self._cached[sliding, pattern] = list(self._blocks(sliding, pattern))
        return self._cached[sliding, pattern]

    def _blocks(self, sliding: int | None, pattern: Pattern) -> Iterator[tuple[slice, Tensor, Tensor]]:
        columns = torch.arange(len(self.ids), device=self.ids.device)
        for rows in (
            slice(start, min(start + QUERY_BLOCK, len(columns))) for start in range(0, len(columns), QUERY_BLOCK)
        ):
            branch, positions = self.branch[: rows.stop], self.positions[: rows.stop]
            distance = positions[rows, None] - positions
            seen = (columns[: rows.stop] <= columns[rows, None]) & ((branch == 0) | (branch == branch[rows, None]))
            if sliding is not None:
                seen &= distance < sliding
            near = seen if pattern.window is None else seen & ((positions < pattern.sink) | (distance < pattern.window))
            yield rows, near, seen & ~near


def _strongest(query: Tensor, key: Tensor, others: Tensor, most: int) -> Tensor:
    """Of `others`, bool [queries, keys], the `most` keys with the highest logits: bool [1, heads, queries, keys].

    query: [1, heads, queries, dim]; key: [1, heads, keys, dim].
    """
    logits = (query.float() @ key.float().mT).masked_fill(~others, float("-inf"))
    best = logits.topk(min(most, key.shape[2]), -1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True) & others


class LimitedDocument:
    """A document whose continuations are scored while heads are limited."""

    def __init__(self, model: PreTrainedModel, document: Document):
        shape, every = describe(model), document.continuations
        together = shape.prefix_free and not shape.recurrent
        parts = [every] if together else [[one] for one in every]
        self.model, self.shape = model, shape
        self.texts = [LimitedText(document.ids, part, input_device(model)) for part in parts]
        self.targets = [torch.tensor(ids[-count:], device=input_device(model)) for _, ids, count in every]

    @torch.no_grad()
    def log_probs(self, limit: Limit) -> list[Tensor]:
        """Log-probabilities of the scored tokens of every continuation, float32 [scored, vocabulary] each."""
        found: list[Tensor] = []
        for text in self.texts:
            arguments = {"position_ids": text.positions[None], "use_cache": False, "logits_to_keep": text.scored}
            with replace_attention(self.model, partial(self._attend, text, limit)):
                logits = self.model(text.ids[None], **arguments).logits[0]
            found += logits.float().log_softmax(-1).split(text.counts)
        return found

    def _attend(self, text: LimitedText, limit: Limit, inputs: Inputs) -> Tensor:
        check_all_heads("ablate", self.shape, inputs.layer, inputs.query.shape[1])
        return text.attend(inputs, limit)


def mean_outputs(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Mean output of every query head over the tokens of texts, before the output projection: {layer: float32 [heads, dim]}."""
    sums: dict[int, Tensor] = {}

    def add(seen: AttentionRecord) -> None:
        sums[seen.layer] = sums.get(seen.layer, 0) + seen.output[0].float().sum(1)

    for ids in texts:
        tokens = torch.tensor([list(ids)], device=input_device(model))
        with torch.no_grad(), observe_attention(model, add):
            decoder(model)(tokens, use_cache=False)
    return {layer: total / sum(map(len, texts)) for layer, total in sums.items()}
