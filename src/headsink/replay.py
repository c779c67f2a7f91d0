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

from headsink.architecture import decoder, describe
from headsink.attention import Seen, engaged, observing, substituting
from headsink.blockwise import Inputs
from headsink.output import OutputNorms
from headsink.pattern import FULL, Pattern, visible
from headsink.probes import Document

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


class Replay:
    """A document that the model has read, and its branches: the continuation first, then the questions.

    forms: names of the branches ("text" for the continuation). full: float32 [scored tokens, vocabulary], the log-probabilities
    of the model itself; targets: int64 [scored tokens]; branch: int64 [scored tokens], the branch of each. value_norms:
    float32 [layers, KV heads], the median value norm over the document.
    """

    def __init__(self, model: PreTrainedModel, document: Document):
        self.model, self.shape = model, describe(model)
        self.length = len(document.ids)
        self._read(document.ids)
        self.forms = [form for form, _, _ in document.branches]
        ids: list[int] = []
        positions: list[int] = []
        owner: list[int] = []
        scored: list[int] = []
        own: list[int] = []
        for number, (_, tokens, count) in enumerate(document.branches):
            end = len(ids) + len(tokens)
            scored += range(end - count - 1, end - 1)  # each token is predicted from the one before it
            own += [number] * count
            ids += tokens
            positions += range(self.length, self.length + len(tokens))
            owner += [number] * len(tokens)
        device = model.device
        self.ids, self.positions = (torch.tensor(x, device=device) for x in (ids, positions))
        self.scored, self.branch = (torch.tensor(x, device=device) for x in (scored, own))
        self.targets = self.ids[self.scored + 1]
        branch_of = torch.tensor(owner, device=device)
        self._apart = self.positions[:, None] - self.positions  # [tokens, tokens]
        self._within = (branch_of[:, None] == branch_of) & (self._apart >= 0)
        self.full = self.log_probs([None if window else [FULL] * self.shape.kv_heads for window in self.shape.windows])

    def _read(self, ids: list[int]) -> None:
        self._keys: list[Tensor] = []  # of each layer, [KV heads, tokens, dim], in 16 bits
        self._values: list[Tensor] = []
        self._norms: list[Tensor] = []  # of the values, float32 [KV heads, tokens]

        def keep(seen: Seen) -> None:
            last = slice(0 if seen.sliding is None else max(0, seen.length - seen.sliding), None)
            kind = torch.bfloat16 if seen.key.dtype == torch.float32 else seen.key.dtype
            self._norms.append(seen.value[0].float().norm(dim=-1))
            self._keys.append(seen.key[0, :, last].to(kind, copy=True))
            self._values.append(seen.value[0, :, last].to(kind, copy=True))

        with torch.no_grad(), engaged(self.model), observing(keep):
            decoder(self.model)(torch.tensor([ids], device=self.model.device), use_cache=False)
        self.value_norms = torch.stack([norms.median(-1).values for norms in self._norms])

    def set_thresholds(self, thresholds: Tensor) -> None:
        """[layers, KV heads]: the value norms below which a key can be a floating sink."""
        self._short = [norms < limits[:, None] for norms, limits in zip(self._norms, thresholds, strict=True)]

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
            output = torch.cat([self._head(inputs, head, pattern) for head, pattern in enumerate(row)], 1)
            return output if look is None else look(inputs, output)

        with engaged(self.model), substituting(attend):
            hidden = decoder(self.model)(
                self.ids[None], position_ids=self.positions[None], use_cache=False
            ).last_hidden_state[0, self.scored]
        return self.model.get_output_embeddings()(hidden).float().log_softmax(-1)

    def _moved(self, inputs: Inputs, output: Tensor, row: Sequence[Pattern], option: Pattern) -> Tensor:
        """How far each head's output moves if it goes over to `option`: [query heads, tokens, dim]."""
        moved, group = torch.zeros_like(output[0]), self.shape.group
        for head, pattern in enumerate(row):
            if pattern != option:
                rows = slice(head * group, (head + 1) * group)
                moved[rows] = self._head(inputs, head, option)[0] - output[0, rows]
        return moved

    def _head(self, inputs: Inputs, head: int, pattern: Pattern) -> Tensor:
        """Output of the query heads of one KV head: [1, group, tokens, dim]."""
        layer, group = inputs.layer, self.shape.group
        query = inputs.query[:, head * group : (head + 1) * group]
        tokens, dim = query.shape[2:]
        mask = self._within
        keys, values = self._keys[layer][head], self._values[layer][head]
        first = self.length - len(keys)
        if pattern.full:
            context = mask.new_ones(tokens, len(keys))
        else:
            window = pattern.window or 0
            held = torch.arange(first, self.length, device=keys.device)
            short = self._short[layer][head] if pattern.floating else mask.new_zeros(self.length)
            held = _held(pattern, short[first:], held)
            context = visible(pattern, self.positions, held, short[held])
            mask = mask & (self._apart < window)
            keys, values = keys[held - first], values[held - first]
        keys = torch.cat([keys.to(query.dtype), inputs.key[0, head]])
        values = torch.cat([values.to(query.dtype), inputs.value[0, head]])
        rows = torch.cat([context, mask], 1).repeat(group, 1)  # queries of a group as rows: a key is read once
        output = F.scaled_dot_product_attention(
            query.reshape(1, 1, group * tokens, dim), keys[None, None], values[None, None], rows, scale=inputs.scaling
        )
        return output.view(1, group, tokens, dim)


def _held(pattern: Pattern, short: Tensor, positions: Tensor) -> Tensor:
    """Positions of a document that a query after it may see: first tokens, floating sinks, the window of the first such query."""
    last = int(positions[-1]) + 1
    near = positions > last - (pattern.window or 0)
    floating = short & (positions >= pattern.sink) & ~near
    newest = floating.flip(0).cumsum(0).flip(0) <= pattern.floating
    return positions[(positions < pattern.sink) | near | (floating & newest)]
