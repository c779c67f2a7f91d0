"""What patterns cost, tried out cheaply: a document is read once, what may follow it is run again and again.

The model reads the document as it is, and its keys and values are kept. Then the continuation and the questions run over them in
one pass, each as a branch that sees the document and itself, under any patterns: a few hundred tokens, not thousands. A
backward pass through those tokens gives, for every KV head at once, how the loss would move if its output were that of
another pattern: the gradient of the loss by the head's output, times the difference of the two outputs. It is taken at
the plan that is being changed and goes through all following layers, so that errors which add up, cancel or get
mended later are seen as they are.

What this leaves out is that under a plan the document too is read with its patterns; `quality.py` measures that.
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
from headsink.calibration.score_fit import Demand
from headsink.compression.continuations import Context, Continuations, read
from headsink.data.documents import Document
from headsink.eviction.lifetimes import best
from headsink.eviction.pattern import FULL, Pattern
from headsink.eviction.scoring import key_scores
from headsink.eviction.selection import places

Patterns = Sequence[Sequence[Pattern] | None]  # [layers][KV heads], None for a layer that slides by itself


@dataclass(frozen=True)
class Marginals:
    """What other patterns would do at a plan. loss: of the plan.

    gradient: float32 [layers, KV heads, options], the first-order change of the loss. error: the squared distance of the head's
    output from the plan's, relative to the layer's output, averaged over the scored tokens. Both 0 for layers that slide.
    """

    loss: float
    gradient: Tensor
    error: Tensor


class Replay(Context):
    """A document that the model has read, and its branches: the continuation first, then the questions.

    forms: names of the branches ("text" for the continuation). full: float32 [scored tokens, vocabulary], the log-probabilities
    of the model itself; targets: int64 [scored tokens]; branch: int64 [scored tokens], the branch of each.
    prefill_compression: whether branches keep all of their own tokens and all that was held at the end of the document
    (`headsink.compress`).
    """

    def __init__(self, model: PreTrainedModel, document: Document, prefill_compression: bool = False):
        super().__init__(model, document.ids, *read(model, document.ids))
        self.document, self.prefill_compression = document, prefill_compression
        self._scores = [keys.new_zeros(keys.shape[:2]) for keys in self._keys]  # until there are some
        device = model.device
        self.forms = [form for form, _, _ in document.branches]
        self._branches = Continuations([tokens for _, tokens, _ in document.branches], self.length, device)
        scored: list[int] = []
        own: list[int] = []
        for number, (rows, (_, _, count)) in enumerate(zip(self._branches.rows, document.branches, strict=True)):
            scored += range(rows.stop - count - 1, rows.stop - 1)  # each token is predicted from the one before it
            own += [number] * count
        self.scored, self.branch = (torch.tensor(x, device=device) for x in (scored, own))
        self.targets = self._branches.ids[self.scored + 1]
        self.full = self.log_probs([None if window else [FULL] * self.shape.kv_heads for window in self.shape.windows])

    def set_scores(self, weights: Tensor) -> None:
        """[layers, KV heads, features]: weights of the keys' scores."""
        self._weights = weights.to(self.model.device)
        held = zip(self._keys, self._values, self._weights, strict=True)
        self._scores = [key_scores(keys, values, own) for keys, values, own in held]

    def set_told(self, told: Demand) -> None:
        """Score the keys by what telling the whole document again takes."""
        self._scores = [
            own.to(old.device) if window is None else old
            for own, old, window in zip(told.attention, self._scores, self.shape.windows, strict=True)
        ]

    # running the branches

    def log_probs(self, patterns: Patterns) -> Tensor:
        """Log-probabilities of the scored tokens under patterns, float32 [scored tokens, vocabulary]."""
        with torch.no_grad():
            return self._run(patterns, None)

    def divergences(self, log_probs: Tensor) -> Tensor:
        """KL(full || given) of every branch, the mean over its tokens, float32 [branches]; the text is branch 0."""
        kl = (self.full.exp() * (self.full - log_probs)).sum(-1)
        return torch.stack([kl[self.branch == number].mean() for number in range(len(self.forms))])

    def loss(self, log_probs: Tensor, retrieval_weight: float) -> Tensor:
        """KL of the text + retrieval_weight x the mean KL of the answers."""
        kl = self.divergences(log_probs)
        return kl[0] + retrieval_weight * kl[1:].mean() if len(kl) > 1 else kl[0]

    def marginals(self, patterns: Patterns, options: Sequence[Pattern], retrieval_weight: float) -> Marginals:
        """The loss under patterns, and how it would move with every head at every option. One forward and one backward pass."""
        outputs: dict[int, Tensor] = {}
        moves: dict[int, Tensor] = {}  # layer: [options, query heads, tokens, dim]
        error = torch.zeros(self.shape.layers, self.shape.kv_heads, len(options))

        def look(inputs: Inputs, output: Tensor) -> Tensor:
            row = patterns[inputs.layer]
            output = output.requires_grad_() if not output.requires_grad else output
            if row is None:
                return output
            outputs[inputs.layer] = output
            with torch.no_grad():
                moves[inputs.layer] = torch.stack(
                    [self._moved(inputs, output, row, option) for option in options]
                ).bfloat16()
                norms = OutputNorms(inputs.module, self.shape.kv_heads, self.shape.head_dim)
                layer = norms.layer(output[0, :, self.scored]).clamp(min=torch.finfo(torch.float32).tiny)
                for n, moved in enumerate(moves[inputs.layer]):
                    error[inputs.layer, :, n] = (norms.groups(moved[:, self.scored].float()) / layer).mean(-1)
            return output

        with torch.enable_grad():
            loss = self.loss(self._run(patterns, look), retrieval_weight)
            slopes = torch.autograd.grad(loss, list(outputs.values()))
        gradient = torch.zeros_like(error)
        for layer, slope in zip(outputs, slopes, strict=True):
            by_head = (moves[layer] * slope).float().unflatten(1, (self.shape.kv_heads, -1))
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

        return self.run(self._branches, attend, self.scored).float().log_softmax(-1)

    def _moved(self, inputs: Inputs, output: Tensor, row: Sequence[Pattern], option: Pattern) -> Tensor:
        """How far each head's output moves if it goes over to `option`: [query heads, tokens, dim]."""
        before = output[0].unflatten(0, (self.shape.kv_heads, -1))
        moved = torch.zeros_like(before)
        heads = [head for head, pattern in enumerate(row) if pattern != option]
        if heads:
            moved[heads] = self._part(inputs, heads, option) - before[heads]
        return moved.flatten(0, 1)

    def _part(self, inputs: Inputs, heads: list[int], pattern: Pattern) -> Tensor:
        """Output of the query heads of some KV heads under a pattern: [KV heads, group, tokens, dim]."""
        layer, group = inputs.layer, self.shape.group
        softmax = AttentionParams(inputs.scaling, inputs.softcap, inputs.sink_logits).of(heads, self.shape.kv_heads)
        query = inputs.query[0].unflatten(0, (-1, group))[heads]
        own = inputs.key[0, heads], inputs.value[0, heads]
        held = None if pattern.full else self._kept(layer, heads, pattern)
        context = [_take(kept[heads], held).to(query.dtype) for kept in self.held(layer)]
        parts = []
        for rows in self._branches.rows:
            keys, values = (torch.cat([kept, new[:, rows]], 1) for kept, new in zip(context, own, strict=True))
            mask = self._mask(layer, heads, pattern, held, own[0][:, rows], own[1][:, rows])
            asked = query[:, :, rows]
            if softmax.plain:
                output = F.scaled_dot_product_attention(  # queries of a group as rows: a key is read once
                    asked.flatten(1, 2)[None],
                    keys[None],
                    values[None],
                    mask.expand(len(heads), *mask.shape[-2:]).repeat(1, group, 1)[None],
                    scale=softmax.scaling,
                )
            else:
                output = attend_rows(asked.flatten(0, 1)[None], keys[None], values[None], mask[None], softmax)
            parts.append(output.view(asked.shape))
        return torch.cat(parts, 2)

    def _near(self, layer: int, pattern: Pattern) -> range:
        """Places, among the keys of a layer, of the window of the first query after the document, first tokens left out.

        That query is in the window itself, unless the cache is held: then the window stays as the document left it.
        """
        size, window = self._keys[layer].shape[1], pattern.window or 0
        if not (self.prefill_compression and self.shape.windows[layer] is None):
            window = max(window - 1, 0)
        return range(max(size - window, min(pattern.sink, size)), size)

    def _kept(self, layer: int, heads: list[int], pattern: Pattern) -> Tensor:
        """Places of the keys that the first query after the document sees: first tokens, top-k keys, the window.
        int64 [heads, keys]."""
        sink = min(pattern.sink, self._keys[layer].shape[1])
        return places(self._scores[layer][heads], sink, pattern.top_k, self._near(layer, pattern))

    def _mask(
        self, layer: int, heads: list[int], pattern: Pattern, held: Tensor | None, key: Tensor, value: Tensor
    ) -> Tensor:
        """Which of the kept keys and of a branch's own tokens each token of the branch sees: bool [heads or 1, tokens, keys].

        held: as `_kept` gives it, None for all keys. key, value: of the branch, [heads, tokens, dim].
        """
        tokens, size = key.shape[1], self._keys[layer].shape[1]
        places = torch.arange(tokens, device=key.device)
        apart = places[:, None] - places
        if held is None or (self.prefill_compression and self.shape.windows[layer] is None):
            return F.pad(apart >= 0, (size if held is None else held.shape[1], 0), value=True)[None]
        near, window = self._near(layer, pattern), pattern.window or 0
        until = held.shape[1] - len(near)
        # Query n is n + size - place away from a key of the document.
        window_of_context = places[:, None] + size - torch.arange(near.start, near.stop, device=key.device) < window
        mask = F.pad(torch.cat([window_of_context, (apart >= 0) & (apart < window)], 1), (until, 0), value=True)
        if not pattern.top_k:
            return mask[None]
        scores, sinks = self._scores[layer][heads], min(pattern.sink, size)
        new = key_scores(key.detach(), value.detach(), self._weights[layer, heads])
        # Query n has let go of the keys up to `window` before it.
        gone = (places + size - window - near.start + 1).clamp(min=0)
        leaving = torch.cat([scores[:, near.start : near.stop], new], 1)[:, : int(gone[-1])]
        seen = best(scores.gather(1, held[:, sinks:until]), leaving, gone, pattern.top_k)
        mask = mask.repeat(len(heads), 1, 1)
        mask[:, :, sinks : sinks + seen.shape[2]] = seen | _beyond(
            mask[:, :, sinks : sinks + seen.shape[2]], until - sinks
        )
        return mask


def _beyond(mask: Tensor, first: int) -> Tensor:
    """The mask, with its first columns hidden."""
    return F.pad(mask[:, :, first:], (first, 0), value=False)


def _take(kept: Tensor, places: Tensor | None) -> Tensor:
    """kept: [heads, keys, dim]; places: int64 [heads, fewer], None for all."""
    return kept if places is None else kept.gather(1, places[..., None].expand(-1, -1, kept.shape[2]))
