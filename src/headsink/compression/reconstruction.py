"""A context told again by the model that has read it: which keys that takes, and values that make up for the others.

Spans of the context are run after it once more, as if the model was asked to repeat them. The largest attention that a key gets
there says how much it is needed, whatever is asked later (KVzip, arXiv 2505.23416). Heads keep as many of the best as
their patterns say. What the others gave to the outputs is then put into the values of the kept ones: for each head, ridge
regression, in closed form, of what its outputs lose on its attention to what is kept. This changes no shape and costs no byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from headsink.attention.params import AttentionParams, Inputs, shares
from headsink.compression.continuations import Context, Continuations
from headsink.eviction.pattern import Pattern
from headsink.eviction.selection import places
from headsink.plan.plan import Plan

PROMPT = "\n\nRepeat the previous context exactly.\n\n"
LEAD, SPAN = 8, 128  # tokens before a span that tell where it begins; of a span
ROWS = 8192  # queries of a KV head that values are fitted to, at most, at even distances
FITTED = 2048  # values of a KV head that are fitted, at most: those of the keys with the highest scores
RIDGE = 0.01  # of the mean squared attention to a kept key


def prompt_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What asks the model to tell a context again."""
    return tuple(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])


class Reconstruction:
    """Spans of a context, each told again by itself after `prompt`."""

    def __init__(self, context: Context, prompt: Sequence[int], spans: Sequence[range]):
        self.context, self.spans = context, spans
        texts = [[*prompt, *context.ids[max(span.start - LEAD, 0) : span.stop]] for span in spans]
        self.branches = Continuations(texts, context.length, context.model.device)

    def attend(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Attention in full: its output, [KV heads, group, tokens, dim]; and the log of the largest attention that every key of
        the spans got from its own span, [KV heads, keys] (meaningless in a layer that slides). In float32 or better."""
        kind = torch.promote_types(inputs.query.dtype, torch.float32)
        keys, values = self.context.held(inputs.layer)
        query = inputs.query[0].unflatten(0, (len(keys), -1))
        output = torch.empty_like(query, dtype=kind)
        largest = output.new_empty(len(keys), sum(map(len, self.spans)))
        for head in range(len(keys)):  # one at a time stays in the processor's cache
            key, value, start = keys[head].to(kind), values[head].to(kind), 0
            for rows, span in zip(self.branches.rows, self.spans, strict=True):
                attention = self._attention(inputs, head, rows, key)
                own = inputs.value[0, head, rows].to(kind)
                output[head, :, rows] = (attention @ torch.cat([value, own])).unflatten(0, (query.shape[1], -1))
                if inputs.sliding is None:
                    most = attention[:, span.start : span.stop].amax(0)
                    largest[head, start : start + len(span)] = most.clamp(min=torch.finfo(kind).tiny).log()
                start += len(span)
        return output, largest

    def _attention(self, inputs: Inputs, head: int, rows: slice, keys: Tensor, stride: int = 1) -> Tensor:
        """Attention of a span's queries of one KV head, of every `stride`th, to `keys` [keys, dim] of the context and to the
        span itself: [group x tokens, keys + tokens]. Of a layer that slides, keys are all that it holds."""
        group = inputs.query.shape[1] // inputs.key.shape[1]
        query = inputs.query[0, head * group : (head + 1) * group, rows].flatten(0, 1)[::stride]
        own = inputs.key[0, head, rows]
        softmax = AttentionParams(inputs.scaling, inputs.softcap, inputs.sink_logits).of([head], len(inputs.key[0]))
        logits = softmax.capped((query.to(keys.dtype) * inputs.scaling) @ torch.cat([keys, own.to(keys.dtype)]).T)
        columns = torch.arange(0 if inputs.sliding is None else -len(keys), len(own), device=keys.device)
        apart = torch.arange(len(own), device=keys.device)[:, None] - columns
        hidden = (apart < 0) if inputs.sliding is None else (apart < 0) | (apart >= inputs.sliding)
        logits[:, logits.shape[1] - len(columns) :].masked_fill_(hidden.repeat(group, 1)[::stride], float("-inf"))
        sink_logits = (
            None if softmax.sink_logits is None else softmax.sink_logits.repeat_interleave(len(own))[::stride, None]
        )
        return shares(logits, sink_logits)

    def fitted(self, inputs: Inputs, outputs: Tensor, head: int, places: Tensor, fixed: int) -> Tensor:
        """Values for the keys at `places` of a KV head, all but the first `fixed`, with which its outputs come as near as they
        can to `outputs`, those of full attention [KV heads, group, tokens, dim]: [places - fixed, dim]."""
        keys, values = (kept[head, places].to(outputs.dtype) for kept in self.context.held(inputs.layer))
        stride = max(1, outputs[0, :, :, 0].numel() // ROWS)
        count = len(places) - fixed
        gram, missed = values.new_zeros(count, count), torch.zeros_like(values[fixed:])
        for rows in self.branches.rows:
            attention = self._attention(inputs, head, rows, keys, stride)
            given = attention @ torch.cat([values, inputs.value[0, head, rows].to(values.dtype)])
            seen = attention[:, fixed : len(places)]
            gram += seen.T @ seen
            missed += seen.T @ (outputs[head, :, rows].flatten(0, 1)[::stride] - given)
        diagonal = gram.diagonal()
        diagonal += RIDGE * diagonal.mean().clamp(min=torch.finfo(gram.dtype).tiny)
        return values[fixed:] + torch.cholesky_solve(missed, torch.linalg.cholesky(gram))


def kept(pattern: Pattern, scores: Tensor) -> Tensor:
    """Places of the keys that a head holds of a context: int64 [places]. scores: [keys], of all of them."""
    length = len(scores)
    sink = min(pattern.sink, length)
    near = range(max(length - pattern.window, sink) if pattern.window is not None else 0, length)
    return places(scores[None], sink, pattern.top_k, near)[0]


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel, plan: Plan, cache: Cache, ids: Tensor, padding: Tensor | None = None
) -> dict[int, Tensor]:
    """Let the model tell the contexts in `cache` again: scores of their keys, to choose by what the plan keeps.

    With `plan.fit_values` values in the cache change, at the places of the keys that will be kept. ids: of the contexts, int64
    [batch, tokens]; padding: int64 [batch], tokens to skip on the left. Returns, for each layer that does not slide by itself,
    [batch, KV heads, tokens] in float32 or better, -inf for padding.
    """
    scores = {
        index: layer.keys.new_full(
            layer.keys.shape[:3], float("-inf"), dtype=torch.promote_types(layer.keys.dtype, torch.float32)
        )
        for index, (row, layer) in enumerate(zip(plan.layers, cache.layers, strict=True))
        if row is not None
    }
    for row, text in enumerate(ids):
        text = text[0 if padding is None else int(padding[row]) :]
        if not len(text):
            continue
        keys, values = (
            [held[row, :, -len(text) :] for held in kind]
            for kind in ([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers])
        )
        for layer, found in _retell_one(Context(model, text.tolist(), keys, values), plan).items():
            scores[layer][row, :, -len(text) :] = found
    return scores


def _retell_one(context: Context, plan: Plan) -> dict[int, Tensor]:
    """Scores of the keys of one context, [KV heads, tokens], for each layer that has patterns; its values may change."""
    spans = [range(start, min(start + SPAN, context.length)) for start in range(0, context.length, SPAN)]
    telling, scores = Reconstruction(context, plan.reconstruction_prompt, spans), {}

    def attend(inputs: Inputs) -> Tensor:
        outputs, largest = telling.attend(inputs)
        row = plan.layers[inputs.layer]
        if row is not None:
            scores[inputs.layer] = largest
            _, values = context.held(inputs.layer)
            for head, pattern in enumerate(one.pattern for one in row):
                if plan.refit_values and pattern.size(context.length) < context.length:
                    held = kept(pattern, largest[head])
                    held = held[largest[head, held].argsort()]
                    fixed = max(len(held) - FITTED, 0)
                    fitted = telling.fitted(inputs, outputs, head, held, fixed)
                    values[head, held[fixed:]] = fitted.to(values.dtype)
        return outputs.flatten(0, 1)[None].to(inputs.query.dtype)

    context.run(telling.branches, attend)
    return scores
