"""Loss and squared errors of patterns on teacher-forced continuations of a cached document.

The document is prefilled once with full attention and its keys and values are kept. Its continuations (text and questions) then
run over them in one pass under any patterns: a few hundred tokens, not thousands. Under a pattern the document is compressed once
at its end: a continuation attends to all kept keys, and causally to itself, as after `headsink.compress`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.eager import attend_rows
from headsink.attention.output_norms import OutputNorms
from headsink.attention.params import AttentionParams, Inputs
from headsink.calibration.score_fit import ImportanceScores
from headsink.calibration.verification import FullCacheScores
from headsink.compression.continuations import Context, Continuations, read
from headsink.compression.reconstruction import kept_keys
from headsink.data.documents import Document
from headsink.eviction.pattern import FULL, Pattern
from headsink.models.distributed import input_device

Patterns = Sequence[Sequence[Pattern] | None]  # [layers][KV heads], None for a layer that no plan governs


class CachedDocument(Context):
    """A prefilled document and its continuations.

    full: scores of the continuations with the full cache. importance: float32 [layers, KV heads, tokens], by which top-k keys are
    chosen; 0 until `set_importance`.
    """

    def __init__(self, model: PreTrainedModel, document: Document):
        super().__init__(model, document.ids, *read(model, document.ids))
        self.importance = torch.zeros(self.shape.layers, self.shape.kv_heads, self.length, device=input_device(model))
        self._continuations = Continuations(
            [tokens for _, tokens, _ in document.continuations], self.length, input_device(model)
        )
        scored: list[int] = []
        branch: list[int] = []
        for number, (rows, (_, _, count)) in enumerate(
            zip(self._continuations.rows, document.continuations, strict=True)
        ):
            scored += range(rows.stop - count - 1, rows.stop - 1)  # predictions are made at the token before
            branch += [number] * count
        self._scored = torch.tensor(scored, device=input_device(model))
        targets = self._continuations.ids[self._scored + 1]
        full = self.log_probs(self.full_patterns())
        self.full = FullCacheScores(document, full, targets, torch.tensor(branch, device=input_device(model)))

    def set_importance(self, importance: ImportanceScores) -> None:
        """Choose top-k keys by the importance of the whole document."""
        self.importance = importance.attention.to(input_device(self.model))

    def full_patterns(self) -> list[list[Pattern] | None]:
        return [[FULL] * self.shape.kv_heads if own else None for own in self.shape.planned]

    def loss(self, patterns: Patterns) -> float:
        """The measured loss of patterns."""
        return self.full.loss(self.log_probs(patterns))

    def log_probs(self, patterns: Patterns) -> Tensor:
        """Log-probabilities of the scored tokens under patterns, float32 [scored tokens, vocabulary]."""
        return self._run(patterns, lambda inputs, output: None)

    def squared_errors(self, options: Sequence[Pattern]) -> Tensor:
        """Error of each KV head's output under other patterns at the full cache: float32 [layers, KV heads, options].

        The squared change of the head's output relative to the layer's output, both after the output projection, mean over the
        scored tokens; 0 for layers that no plan governs.
        """
        errors = torch.zeros(self.shape.layers, self.shape.kv_heads, len(options))

        def measure(inputs: Inputs, output: Tensor) -> None:
            if not self.shape.planned[inputs.layer]:
                return
            norms = OutputNorms(inputs.module, self.shape.kv_heads, self.shape.head_dim)
            full = output[0, :, self._scored]
            layer = norms.layer(full).clamp(min=torch.finfo(torch.float32).tiny)
            for n, option in enumerate(options):
                if not option.full:
                    other = self._attend(inputs, [option] * self.shape.kv_heads)[0, :, self._scored]
                    errors[inputs.layer, :, n] = (norms.groups((other - full).float()) / layer).mean(-1)

        self._run(self.full_patterns(), measure)
        return errors

    def _run(self, patterns: Patterns, observe: Callable[[Inputs, Tensor], None]) -> Tensor:
        def attend(inputs: Inputs) -> Tensor:
            source = self.shape.source(inputs.layer)
            output = self._attend(inputs, patterns[source] or [FULL] * self.shape.heads[source][1])
            observe(inputs, output)
            return output

        with torch.no_grad():
            return self.run(self._continuations, attend, self._scored).float().log_softmax(-1)

    def _attend(self, inputs: Inputs, row: Sequence[Pattern]) -> Tensor:
        """Attention output of a layer under the patterns of its KV heads, [1, query heads, tokens, dim]."""
        output = torch.empty_like(inputs.query[0].unflatten(0, (len(row), -1)))
        for pattern in dict.fromkeys(row):
            heads = [head for head, own in enumerate(row) if own == pattern]
            output[heads] = self._attend_heads(inputs, heads, pattern)
        return output.flatten(0, 1)[None]

    def _attend_heads(self, inputs: Inputs, heads: list[int], pattern: Pattern) -> Tensor:
        """Output of the query heads of some KV heads under a pattern: [KV heads, group, tokens, dim]."""
        kv_heads = inputs.key.shape[1]
        group = inputs.query.shape[1] // kv_heads
        softmax = AttentionParams(inputs.scaling, inputs.softcap, inputs.sink_logits).of(heads, kv_heads)
        query = inputs.query[0].unflatten(0, (-1, group))[heads]
        context = [cached[heads].to(query.dtype) for cached in self.key_values(inputs.layer)]
        if not pattern.full:
            kept = torch.stack([kept_keys(pattern, scores) for scores in self.importance[inputs.layer, heads]])
            context = [cached.gather(1, kept[..., None].expand(-1, -1, cached.shape[2])) for cached in context]
        parts = []
        for rows in self._continuations.rows:
            keys, values = (
                torch.cat([old, new[0, heads, rows]], 1)
                for old, new in zip(context, (inputs.key, inputs.value), strict=True)
            )
            queries = query[:, :, rows]
            mask = _mask(queries.shape[2], keys.shape[1], inputs.sliding, keys.device)
            if softmax.plain:
                output = F.scaled_dot_product_attention(  # queries of a group as rows: each key is read once
                    queries.flatten(1, 2)[None], keys[None], values[None], mask.repeat(group, 1), scale=softmax.scaling
                )
            else:
                output = attend_rows(queries.flatten(0, 1)[None], keys[None], values[None], mask[None, None], softmax)
            parts.append(output.view(queries.shape))
        return torch.cat(parts, 2)


def _mask(tokens: int, keys: int, sliding: int | None, device: torch.device) -> Tensor:
    """Which keys the tokens of a continuation see, its own being the last: bool [tokens, keys]. sliding: the layer's window."""
    distance = torch.arange(keys - tokens, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) if sliding is None else (distance >= 0) & (distance < sliding)


def mean_loss(documents: Sequence[CachedDocument], patterns: Patterns) -> float:
    """The measured loss of patterns, mean over cached documents."""
    return sum(document.loss(patterns) for document in documents) / len(documents)
