"""Query-agnostic KV importance by context reconstruction (KVzip, arXiv 2505.23416), and refitting of the kept keys (Attention
Matching, arXiv 2602.16284).

The prompt "repeat the previous context" and then spans of the context are run over the cached context. The importance score of a
key is the largest attention that it receives from the queries of its own span; it does not depend on later questions. Each head
keeps as many of its top-scoring keys as its pattern says. Then they are refitted as in eviction/refitting.py, for the queries of
the second pass: a synthetic key for the evicted ones, and least-squares values of all kept keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from headsink.attention.chunked import normaliser
from headsink.attention.params import AttentionParams, Inputs, shares
from headsink.compression.continuations import Context, Continuations, check_continues, states_of
from headsink.eviction.pattern import Pattern
from headsink.eviction.refitting import mean_of, ridge_regression, synthetic_key
from headsink.eviction.scorers import ALWAYS
from headsink.eviction.selection import kept_indices
from headsink.models.distributed import input_device
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.utils import flash

PROMPT = "\n\nRepeat the previous context exactly.\n\n"
LEAD, SPAN = 8, 128  # tokens before a span that mark where it begins; tokens of a span
ROWS = 1024  # queries per KV head in the refit at most, evenly spaced
RIDGE = 0.1  # ridge penalty of values, as in eviction/refitting.py


def prompt_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of the prompt for context reconstruction."""
    return tuple(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])


class Reconstruction:
    """Forward pass that reconstructs spans of a context, each in its own continuation after `prompt`."""

    def __init__(self, context: Context, prompt: Sequence[int], spans: Sequence[range]):
        self.context, self.spans = context, spans
        texts = [[*prompt, *context.ids[max(span.start - LEAD, 0) : span.stop]] for span in spans]
        self.continuations = Continuations(texts, context.length, input_device(context.model))

    def attend(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Full attention of the continuations.

        Returns its output, [KV heads, group, tokens, dim], and the importance scores, [KV heads, keys of the spans]: the log of
        the largest attention that a key receives from its own span (undefined in a sliding-window layer). Both are float32 or
        float64.
        """
        if inputs.sliding is None and inputs.params.plain and flash.has_kernel(inputs.query):
            return self._attend_by_kernel(inputs)
        kind = torch.promote_types(inputs.query.dtype, torch.float32)
        keys, values = self.context.key_values(inputs.layer)
        query = inputs.query[0].unflatten(0, (len(keys), -1))
        output = torch.empty_like(query, dtype=kind)
        largest = output.new_empty(len(keys), sum(map(len, self.spans)))
        for head in range(len(keys)):  # one head at a time fits the processor's cache
            key, value, start = keys[head].to(kind), values[head].to(kind), 0
            for rows, span in zip(self.continuations.rows, self.spans, strict=True):
                _, attention, _ = self._attention(inputs, head, rows, key)
                own = inputs.value[0, head, rows].to(kind)
                output[head, :, rows] = (attention @ torch.cat([value, own])).unflatten(0, (query.shape[1], -1))
                if inputs.sliding is None:
                    most = attention[:, span.start : span.stop].amax(0)
                    largest[head, start : start + len(span)] = most.clamp(min=torch.finfo(kind).tiny).log()
                start += len(span)
        return output, largest

    def _attend_by_kernel(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """As `attend`: attention to the context and to the continuations, joined by their log-sum-exps."""
        kind = torch.promote_types(inputs.query.dtype, torch.float32)
        keys, values = (cached.to(kind) for cached in self.context.key_values(inputs.layer))
        query, key, value = (given.to(kind) for given in (inputs.query, inputs.key, inputs.value))
        grouped = query[0].unflatten(0, (len(keys), -1))
        seen, lse = (
            found[0].view(*grouped.shape[:3], *found.shape[3:])
            for found in flash.attend(grouped.flatten(1, 2)[None], keys[None], values[None], inputs.scaling, False)
        )
        largest, start = seen.new_empty(len(keys), sum(map(len, self.spans))), 0
        for rows, span in zip(self.continuations.rows, self.spans, strict=True):
            own, own_lse = (
                found[0].view(*grouped[:, :, rows].shape[:3], *found.shape[3:])
                for found in flash.attend(query[:, :, rows], key[:, :, rows], value[:, :, rows], inputs.scaling)
            )
            share = (own_lse - lse[:, :, rows]).sigmoid_()[..., None]
            seen[:, :, rows].lerp_(own, share)
            logits = grouped[:, :, rows].flatten(1, 2) @ keys[:, span.start : span.stop].mT * inputs.scaling
            logits -= torch.logaddexp(own_lse, lse[:, :, rows]).flatten(1, 2)[..., None]
            largest[:, start : start + len(span)] = logits.amax(1).clamp(min=math.log(torch.finfo(kind).tiny))
            start += len(span)
        return seen, largest

    def _attention(
        self, inputs: Inputs, head: int, rows: slice, keys: Tensor, stride: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of one KV head's queries of one continuation, every `stride`th, to `keys` [keys, dim] of the context and
        to the continuation. In a sliding-window layer `keys` is the whole cache.

        Returns the queries, scaled, [group x tokens, dim], the attention, [group x tokens, keys + tokens], and its log-sum-exp.
        """
        group = inputs.query.shape[1] // inputs.key.shape[1]
        query = inputs.query[0, head * group : (head + 1) * group, rows].flatten(0, 1)[::stride]
        query, own = query.to(keys.dtype) * inputs.scaling, inputs.key[0, head, rows]
        softmax = AttentionParams(inputs.scaling, inputs.softcap, inputs.sink_logits).of([head], len(inputs.key[0]))
        logits = softmax.capped(query @ torch.cat([keys, own.to(keys.dtype)]).T)
        columns = torch.arange(0 if inputs.sliding is None else -len(keys), len(own), device=keys.device)
        distance = torch.arange(len(own), device=keys.device)[:, None] - columns
        hidden = (distance < 0) if inputs.sliding is None else (distance < 0) | (distance >= inputs.sliding)
        logits[:, logits.shape[1] - len(columns) :].masked_fill_(hidden.repeat(group, 1)[::stride], float("-inf"))
        sink_logits = (
            None if softmax.sink_logits is None else softmax.sink_logits.repeat_interleave(len(own))[::stride, None]
        )
        weights = shares(logits, sink_logits)
        return query, weights, normaliser(logits, weights)

    def refit_keys(
        self, inputs: Inputs, outputs: Tensor, head: int, indices: Tensor, last: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return keys and least-squares values for the kept keys of a KV head, [kept, dim] each (eviction/refitting.py).

        outputs: of full attention, [KV heads, group, tokens, dim], the target. indices: of the kept keys in the context, int64
        [kept]. last: where in `indices` the key stands that the synthetic key replaces, None for none.
        """
        key, value = (cached[head].to(outputs.dtype) for cached in self.context.key_values(inputs.layer))
        keys, values = key[indices], value[indices]
        stride = -(-outputs[0, :, :, 0].numel() // ROWS)
        if last is not None:
            found = [self._attention(inputs, head, rows, key, stride) for rows in self.continuations.rows]
            queries, total = (torch.cat([part[n] for part in found]) for n in (0, 2))
            full = torch.cat([part[1][:, : len(key)] for part in found])
            evicted = torch.ones_like(key[:, 0]).index_fill_(0, indices, 0)
            evicted[indices[last]] = 1
            mass = full.sum(0) * evicted
            mean, values[last] = (mean_of(mass, evicted, given) for given in (key, value))
            keys[last] = synthetic_key(queries, full @ evicted, total, mean)
        weights, residual = [], []
        for rows in self.continuations.rows:
            _, attention, _ = self._attention(inputs, head, rows, keys, stride)
            output = attention @ torch.cat([values, inputs.value[0, head, rows].to(values.dtype)])
            weights.append(attention[:, : len(indices)])
            residual.append(outputs[head, :, rows].flatten(0, 1)[::stride] - output)
        return keys, values + ridge_regression(torch.cat(weights), torch.cat(residual), RIDGE)


def kept_keys(pattern: Pattern, scores: Tensor) -> Tensor:
    """Indices of the keys of a context that a head keeps: int64 [kept]. scores: importance scores of all keys, [keys]."""
    length = len(scores)
    sink = min(pattern.sink, length)
    near = range(max(length - pattern.window, sink) if pattern.window is not None else 0, length)
    return kept_indices(scores[None], sink, pattern.top_k, near)[0]


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel, plan: Plan, cache: Cache, ids: Tensor, padding: Tensor | None = None
) -> dict[int, Tensor]:
    """Importance scores of all keys in `cache` by context reconstruction. Refits the values of the keys that will be kept, in
    the cache.

    ids: of the contexts, int64 [batch, tokens]. padding: left padding of each row, int64 [batch]. Returns, for each layer
    without a sliding window, float32 or float64 [batch, KV heads, tokens], -inf for padding.
    """
    shape = describe(model)
    if shape.recurrent:
        check_continues(model)
    scores = {
        index: layer.keys.new_full(
            layer.keys.shape[:3], float("-inf"), dtype=torch.promote_types(layer.keys.dtype, torch.float32)
        )
        for index, (row, layer) in enumerate(zip(plan.layers, cache.layers, strict=True))
        if row is not None
    }
    for row, tokens in enumerate(ids):
        tokens = tokens[0 if padding is None else int(padding[row]) :]
        if not len(tokens):
            continue
        attending = {n: layer for n, layer in enumerate(cache.layers) if n in shape.attending and shape.keys_of[n] == n}
        keys = {n: layer.keys[row, :, -len(tokens) :] for n, layer in attending.items()}
        values = {n: layer.values[row, :, -len(tokens) :] for n, layer in attending.items()}
        states = states_of(cache, row) if shape.recurrent else None
        for layer, row_scores in _reconstruct_row(Context(model, tokens.tolist(), keys, values, states), plan).items():
            scores[layer][row, :, -len(tokens) :] = row_scores
    return scores


def _reconstruct_row(context: Context, plan: Plan) -> dict[int, Tensor]:
    """Importance scores of one context, [KV heads, tokens], for each layer that has patterns. Refits values in place."""
    spans = [range(start, min(start + SPAN, context.length)) for start in range(0, context.length, SPAN)]
    reconstruction, scores = Reconstruction(context, plan.reconstruction_prompt, spans), {}

    def attend(inputs: Inputs) -> Tensor:
        outputs, largest = reconstruction.attend(inputs)
        row = plan.layers[inputs.layer]  # None for layers that attend to another layer's keys
        if row is not None:
            scores[inputs.layer] = largest
            keys, values = context.key_values(inputs.layer)
            for head, pattern in enumerate(one.pattern for one in row):
                if pattern.size(context.length) < context.length:
                    indices = kept_keys(pattern, largest[head])
                    last = pattern.sink + pattern.top_k - 1 if pattern.top_k > 1 else None
                    new_keys, new_values = reconstruction.refit_keys(inputs, outputs, head, indices, last)
                    keys[head, indices], values[head, indices] = new_keys.to(keys.dtype), new_values.to(values.dtype)
                    if last is not None:
                        largest[head, indices[last]] = ALWAYS
        return outputs.flatten(0, 1)[None].to(inputs.query.dtype)

    context.run(reconstruction.continuations, attend)
    return scores
