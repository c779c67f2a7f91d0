"""Prefill into an empty cache on a GPU, with the same kernel launches for all heads of a layer.

Without it, every head group (cache/head_group.py) needs about a hundred small launches, and the host waits for the GPU in
between. At 8,192 tokens of a model with 8 billion parameters that takes longer than the model. Here the host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headsink.attention.cuda.prefill import attend
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import HeadVisibility, KeyVisibility
from headsink.cache.slots import Slots
from headsink.eviction.lifetimes import batched_lifetimes
from headsink.eviction.scorers import NONE
from headsink.utils.device import index, on_card

KEYS_PER_BLOCK = 2**18  # keys scored at once: their features take five times the memory of the keys


def read(
    groups: Sequence[Slots], query: Tensor, key: Tensor, value: Tensor, softmax: AttentionParams, output: Tensor
) -> None:
    """Fill empty groups that keep less than the whole text, and write their attention into `output`.

    query, output: [batch, KV heads, group, tokens, dim]; key, value: [batch, KV heads, tokens, dim]: all heads of the layer. Only
    the output of these groups' heads is written.
    """
    groups = sorted(groups, key=lambda group: not group.pattern.top_k)  # those with top-k keys first
    heads = [head for group in groups for head in group.heads]
    patterns = [group.pattern for group in groups for _ in group.heads]
    kv_heads, (batch, _, tokens, _) = key.shape[1], key.shape
    own = index(heads, key.device)
    query, (key, value) = query[:, own], groups[0].rounded(key[:, own], value[:, own])
    numbers = torch.tensor([[p.sink, p.top_k, p.window or 0] for p in patterns])
    sink, top_k, window = on_card(numbers, key.device).T[..., None]
    columns = torch.arange(tokens, device=key.device)
    until = torch.where(columns < sink, tokens, columns + window).expand(batch, -1, -1)
    scores, best = until.new_zeros(0), until.new_zeros(0)
    scorer = groups[0].scorer
    if some := sum(p.top_k > 0 for p in patterns):
        weights, step = torch.cat([group.weights for group in groups]), max(1, KEYS_PER_BLOCK // (batch * tokens))
        parts = [slice(begin, min(begin + step, some)) for begin in range(0, some, step)]
        scores = torch.cat([scorer.scores(key[:, part], value[:, part], weights[part]) for part in parts], 1)
        leave = (columns >= sink) & (columns < tokens - window)
        scores = scores.masked_fill(~leave[:some], NONE)
        ends, best = batched_lifetimes(scores[..., :0], scores, top_k[:some, 0].expand(batch, some))
        until = torch.cat([torch.where(scores > NONE, ends + (window[:some] - 1), until[:, :some]), until[:, some:]], 1)
    each = [HeadVisibility(p.window, p.sink + p.top_k, tokens if p.top_k else p.sink) for p in patterns]
    sight = KeyVisibility(until.flatten(0, 1), 0, 0, 0, None, False, 0, 0, each * batch)
    found, _ = attend(query.flatten(1, 2), key.flatten(0, 1), value.flatten(0, 1), sight, *softmax.of(heads, kv_heads))
    output[:, own] = found.view(query.shape)
    begin = 0
    for group in groups:
        part = slice(begin, begin := begin + len(group.heads))
        count, filled = group.pattern.top_k, (key[:, part], value[:, part], group.pattern.window or 0)
        group.take(*filled, *((scores[:, part], best[:, part, :count]) if count else ()))
