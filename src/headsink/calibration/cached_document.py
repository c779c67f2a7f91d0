"""Loss of patterns on teacher-forced continuations of a cached document, and its gradient for every KV head.

The document is prefilled once with full attention and its keys and values are kept. Its continuations (text and questions) then
run over them in one pass under any patterns: a few hundred tokens, not thousands. One backward pass gives, for every KV head, the
first-order change of the loss if the head had another pattern: the gradient of the loss with respect to the head's output, times
the difference of the two outputs. The gradient is taken at the current plan and passes through all following layers, so it
includes errors that add up or cancel there.

The prefill of the document itself does not use the patterns here; evaluation/quality.py measures that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.eager import attend_rows
from headsink.attention.output_norms import OutputNorms
from headsink.attention.params import AttentionParams, Inputs
from headsink.calibration.score_fit import ImportanceScores
from headsink.compression.continuations import Context, Continuations, read
from headsink.data.documents import Document
from headsink.eviction.lifetimes import best
from headsink.eviction.pattern import FULL, Pattern
from headsink.eviction.scorers import LINEAR, Scorer
from headsink.eviction.selection import kept_indices

Patterns = Sequence[Sequence[Pattern] | None]  # [layers][KV heads], None for a sliding-window layer


@dataclass(frozen=True)
class Marginals:
    """First-order effects of other patterns at a plan. loss: of the plan.

    gradient: float32 [layers, KV heads, options], the first-order change of the loss. error: same shape, the squared change of
    the head's output relative to the layer's output, mean over the scored tokens. Both are 0 for sliding-window layers.
    """

    loss: float
    gradient: Tensor
    error: Tensor


class CachedDocument(Context):
    """A prefilled document and its continuations: the text that follows first, then the questions.

    forms: name of each continuation ("text" for the first). full: float32 [scored tokens, vocabulary], log-probabilities of the
    full cache. targets: int64 [scored tokens]. branch: int64 [scored tokens], index of the continuation of each.
    prefill_compression: evict once at the end of the document, as `headsink.compress` does, and not within continuations.
    """

    def __init__(self, model: PreTrainedModel, document: Document, prefill_compression: bool = False):
        super().__init__(model, document.ids, *read(model, document.ids))
        self.document, self.prefill_compression = document, prefill_compression
        self._scores = [keys.new_zeros(keys.shape[:2]) for keys in self._keys]  # until `set_scores`
        device = model.device
        self.forms = [form for form, _, _ in document.continuations]
        self._continuations = Continuations([tokens for _, tokens, _ in document.continuations], self.length, device)
        scored: list[int] = []
        branch: list[int] = []
        for number, (rows, (_, _, count)) in enumerate(
            zip(self._continuations.rows, document.continuations, strict=True)
        ):
            scored += range(rows.stop - count - 1, rows.stop - 1)  # predictions are made at the token before
            branch += [number] * count
        self.scored, self.branch = (torch.tensor(x, device=device) for x in (scored, branch))
        self.targets = self._continuations.ids[self.scored + 1]
        self.full = self.log_probs([None if window else [FULL] * self.shape.kv_heads for window in self.shape.windows])

    def set_scores(self, weights: Tensor, scorer: Scorer = LINEAR) -> None:
        """Score the keys by scorer weights, [layers, KV heads, features]."""
        self._weights, self._scorer = weights.to(self.model.device), scorer
        layers = zip(self._keys, self._values, self._weights, strict=True)
        self._scores = [scorer.scores(keys, values, own) for keys, values, own in layers]

    def set_importance(self, importance: ImportanceScores) -> None:
        """Score the keys by their importance in context reconstruction, of the whole document."""
        self._scores = [
            own.to(old.device) if window is None else old
            for own, old, window in zip(importance.attention, self._scores, self.shape.windows, strict=True)
        ]

    # running the continuations

    def log_probs(self, patterns: Patterns) -> Tensor:
        """Log-probabilities of the scored tokens under patterns, float32 [scored tokens, vocabulary]."""
        with torch.no_grad():
            return self._run(patterns, None)

    def divergences(self, log_probs: Tensor) -> Tensor:
        """Mean KL(full || given) per token of every continuation, float32 [continuations]; the text is the first."""
        kl = (self.full.exp() * (self.full - log_probs)).sum(-1)
        return torch.stack([kl[self.branch == number].mean() for number in range(len(self.forms))])

    def loss(self, log_probs: Tensor, retrieval_weight: float) -> Tensor:
        """KL of the text + retrieval_weight x the mean KL of the answers."""
        kl = self.divergences(log_probs)
        return kl[0] + retrieval_weight * kl[1:].mean() if len(kl) > 1 else kl[0]

    def marginals(self, patterns: Patterns, options: Sequence[Pattern], retrieval_weight: float) -> Marginals:
        """The loss under patterns and its first-order change for every head and option, by one forward and one backward pass."""
        outputs: dict[int, Tensor] = {}
        changes: dict[int, Tensor] = {}  # layer -> [options, query heads, tokens, dim]
        error = torch.zeros(self.shape.layers, self.shape.kv_heads, len(options))

        def look(inputs: Inputs, output: Tensor) -> Tensor:
            row = patterns[inputs.layer]
            output = output.requires_grad_() if not output.requires_grad else output
            if row is None:
                return output
            outputs[inputs.layer] = output
            with torch.no_grad():
                changes[inputs.layer] = torch.stack(
                    [self._output_change(inputs, output, row, option) for option in options]
                ).bfloat16()
                norms = OutputNorms(inputs.module, self.shape.kv_heads, self.shape.head_dim)
                layer = norms.layer(output[0, :, self.scored]).clamp(min=torch.finfo(torch.float32).tiny)
                for n, change in enumerate(changes[inputs.layer]):
                    error[inputs.layer, :, n] = (norms.groups(change[:, self.scored].float()) / layer).mean(-1)
            return output

        with torch.enable_grad():
            loss = self.loss(self._run(patterns, look), retrieval_weight)
            slopes = torch.autograd.grad(loss, list(outputs.values()))
        gradient = torch.zeros_like(error)
        for layer, slope in zip(outputs, slopes, strict=True):
            by_head = (changes[layer] * slope).float().unflatten(1, (self.shape.kv_heads, -1))
            gradient[layer] = by_head.flatten(2).sum(-1).T
        return Marginals(float(loss.detach()), gradient, error)

    def _run(self, patterns: Patterns, look: Callable[[Inputs, Tensor], Tensor] | None) -> Tensor:
        def attend(inputs: Inputs) -> Tensor:
            row = patterns[inputs.layer] or [Pattern(0, 0, inputs.sliding)] * self.shape.kv_heads
            output = inputs.query.new_empty(self.shape.kv_heads, self.shape.group, *inputs.query.shape[2:])
            for pattern in dict.fromkeys(row):
                heads = [head for head, own in enumerate(row) if own == pattern]
                output[heads] = self._part(inputs, heads, pattern)
            output = output.flatten(0, 1)[None]
            return output if look is None else look(inputs, output)

        return self.run(self._continuations, attend, self.scored).float().log_softmax(-1)

    def _output_change(self, inputs: Inputs, output: Tensor, row: Sequence[Pattern], option: Pattern) -> Tensor:
        """Change of each head's output if its pattern becomes `option`: [query heads, tokens, dim]."""
        before = output[0].unflatten(0, (self.shape.kv_heads, -1))
        change = torch.zeros_like(before)
        heads = [head for head, pattern in enumerate(row) if pattern != option]
        if heads:
            change[heads] = self._part(inputs, heads, option) - before[heads]
        return change.flatten(0, 1)

    def _part(self, inputs: Inputs, heads: list[int], pattern: Pattern) -> Tensor:
        """Output of the query heads of some KV heads under a pattern: [KV heads, group, tokens, dim]."""
        layer, group = inputs.layer, self.shape.group
        softmax = AttentionParams(inputs.scaling, inputs.softcap, inputs.sink_logits).of(heads, self.shape.kv_heads)
        query = inputs.query[0].unflatten(0, (-1, group))[heads]
        own = inputs.key[0, heads], inputs.value[0, heads]
        indices = None if pattern.full else self._kept(layer, heads, pattern)
        context = [_take(cached[heads], indices).to(query.dtype) for cached in self.key_values(layer)]
        parts = []
        for rows in self._continuations.rows:
            keys, values = (torch.cat([old, new[:, rows]], 1) for old, new in zip(context, own, strict=True))
            mask = self._mask(layer, heads, pattern, indices, own[0][:, rows], own[1][:, rows])
            queries = query[:, :, rows]
            if softmax.plain:
                output = F.scaled_dot_product_attention(  # queries of a group as rows: each key is read once
                    queries.flatten(1, 2)[None],
                    keys[None],
                    values[None],
                    mask.expand(len(heads), *mask.shape[-2:]).repeat(1, group, 1)[None],
                    scale=softmax.scaling,
                )
            else:
                output = attend_rows(queries.flatten(0, 1)[None], keys[None], values[None], mask[None], softmax)
            parts.append(output.view(queries.shape))
        return torch.cat(parts, 2)

    def _near(self, layer: int, pattern: Pattern) -> range:
        """Indices, among a layer's keys, of the window of the first query after the document, without sink tokens.

        The query itself counts as part of the window, except with prefill compression, where the window ends with the document.
        """
        size, window = self._keys[layer].shape[1], pattern.window or 0
        if not (self.prefill_compression and self.shape.windows[layer] is None):
            window = max(window - 1, 0)
        return range(max(size - window, min(pattern.sink, size)), size)

    def _kept(self, layer: int, heads: list[int], pattern: Pattern) -> Tensor:
        """Indices of the keys that the first query after the document sees, int64 [heads, keys]: sinks, top-k keys, window."""
        sink = min(pattern.sink, self._keys[layer].shape[1])
        return kept_indices(self._scores[layer][heads], sink, pattern.top_k, self._near(layer, pattern))

    def _mask(
        self, layer: int, heads: list[int], pattern: Pattern, indices: Tensor | None, key: Tensor, value: Tensor
    ) -> Tensor:
        """Which kept keys and which tokens of its continuation each token sees: bool [heads or 1, tokens, keys].

        indices: of the kept keys, from `_kept`; None for all keys. key, value: of the continuation, [heads, tokens, dim].
        """
        tokens, size = key.shape[1], self._keys[layer].shape[1]
        steps = torch.arange(tokens, device=key.device)
        distance = steps[:, None] - steps
        if indices is None or (self.prefill_compression and self.shape.windows[layer] is None):
            return F.pad(distance >= 0, (size if indices is None else indices.shape[1], 0), value=True)[None]
        near, window = self._near(layer, pattern), pattern.window or 0
        until = indices.shape[1] - len(near)
        # The distance of query n from key i of the document is n + size - i.
        window_of_context = steps[:, None] + size - torch.arange(near.start, near.stop, device=key.device) < window
        mask = F.pad(torch.cat([window_of_context, (distance >= 0) & (distance < window)], 1), (until, 0), value=True)
        if not pattern.top_k:
            return mask[None]
        scores, sinks = self._scores[layer][heads], min(pattern.sink, size)
        new = self._scorer.scores(key.detach(), value.detach(), self._weights[layer, heads])
        # At query n, keys at a distance of `window` or more have left the window.
        evicted = (steps + size - window - near.start + 1).clamp(min=0)
        leaving = torch.cat([scores[:, near.start : near.stop], new], 1)[:, : int(evicted[-1])]
        seen = best(scores.gather(1, indices[:, sinks:until]), leaving, evicted, pattern.top_k)
        mask = mask.repeat(len(heads), 1, 1)
        mask[:, :, sinks : sinks + seen.shape[2]] = seen | _hide_first(
            mask[:, :, sinks : sinks + seen.shape[2]], until - sinks
        )
        return mask


def _hide_first(mask: Tensor, first: int) -> Tensor:
    """The mask with its first columns hidden."""
    return F.pad(mask[:, :, first:], (first, 0), value=False)


def _take(cached: Tensor, indices: Tensor | None) -> Tensor:
    """Select keys. cached: [heads, keys, dim]; indices: int64 [heads, fewer], None for all."""
    return cached if indices is None else cached.gather(1, indices[..., None].expand(-1, -1, cached.shape[2]))
