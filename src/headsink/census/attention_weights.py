"""Whole attention matrices of a short text, for tools that draw or compare them: CircuitsVis, TransformerLens, BertViz.

The census never holds such a matrix; its report and its scores work for long texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.attention.chunked import blocks
from headsink.attention.interface import AttentionRecord, observe_attention
from headsink.errors import HeadsinkError
from headsink.models.distributed import check_all_heads, input_device
from headsink.models.spec import decoder, describe
from headsink.utils.format import ranges

MOST_TOKENS = 1024  # a layer of 32 heads takes 128 MiB


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Result of `attention_weights`.

    tokens: text of every token. layers: numbers of the layers. weights: float32 [layers, query heads, tokens, tokens], from query
    (row) to key (column); rows sum to 1, or to less by the weight of a learned sink logit.
    """

    tokens: list[str]
    layers: list[int]
    weights: Tensor

    def layer(self, number: int) -> Tensor:
        """The weights of one layer by its number in the model: float32 [query heads, tokens, tokens]."""
        if number not in self.layers:
            raise HeadsinkError(f"layer: {number} is not there; one of {', '.join(map(str, self.layers))}")
        return self.weights[self.layers.index(number)]

    def __repr__(self) -> str:
        layers, heads, tokens, _ = self.weights.shape
        return f"AttentionWeights: {layers} layers, {heads} query heads, {tokens} tokens"


def attention_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    layers: Sequence[int] | None = None,
) -> AttentionWeights:
    """The attention matrices of a short text, computed as the model computes them, in float32 on the CPU.

    layers: numbers of layers in the model; by default all with attention. Raises HeadsinkError for an empty text, for more than
    1,024 tokens, for layers without attention, if the layers have different numbers of query heads, and for a model that tensor
    parallelism splits.
    """
    shape = describe(model)
    shape.refuse("attention_weights", "chunked_attention")
    chosen = list(shape.attending) if layers is None else sorted(set(layers))
    if not chosen or (wrong := [layer for layer in chosen if layer not in shape.attending]):
        given = str(wrong[0]) if chosen else "none"
        raise HeadsinkError(f"layers: {given} given; the layers with attention are {ranges(shape.attending)}")
    if len({shape.heads[layer][0] for layer in chosen}) > 1:
        raise HeadsinkError("layers: they have different numbers of query heads; ask for one layer at a time")
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    most = min(MOST_TOKENS, shape.max_context)
    if not 1 <= len(ids) <= most:
        raise HeadsinkError(
            f"text: it has {len(ids)} tokens; give 1 to {most}, and use headsink.analyze for longer texts"
        )
    weights = torch.zeros(len(chosen), shape.heads[chosen[0]][0], len(ids), len(ids))

    def keep(seen: AttentionRecord) -> None:
        check_all_heads("attention_weights", shape, seen.layer, seen.query.shape[1])
        if seen.layer in chosen:
            of_layer = weights[chosen.index(seen.layer)]
            for part in blocks(seen):
                rows = slice(int(part.rows[0]), int(part.rows[-1]) + 1)
                of_layer[:, rows, part.begin : part.begin + part.weights.shape[2]] = part.weights

    with torch.no_grad(), observe_attention(model, keep):
        decoder(model)(torch.tensor([ids], device=input_device(model)), use_cache=False)
    return AttentionWeights([tokenizer.decode([token]) for token in ids], chosen, weights)
