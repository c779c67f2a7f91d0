"""Squared norms of attention outputs after the output projection W_O.

Errors of a pattern are measured in the residual stream: |W_O (o_full - o_pattern)|^2 / |W_O o_full of the whole layer|^2. With
G = W_O^T W_O of a head, |W_O o|^2 = o^T G o, which costs dim^2 per query instead of dim x hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headsink.models.distributed import output_weight, sum_over_ranks


class OutputNorms:
    """Squared norms after the output projection of one attention module.

    kv_heads: KV heads of the module in this process; a share of them in tensor parallelism. The heads of a group are adjacent, as
    in transformers.
    """

    def __init__(self, module: nn.Module, kv_heads: int, head_dim: int):
        weight, self.split = output_weight(module, kv_heads)
        by_group = weight.view(weight.shape[0], kv_heads, -1).permute(1, 0, 2)  # [KV heads, hidden, group x dim]
        by_head = weight.view(weight.shape[0], -1, head_dim).permute(1, 0, 2)  # [query heads, hidden, dim]
        self.weight = weight
        self.group_gram = by_group.transpose(1, 2) @ by_group
        self.head_gram = by_head.transpose(1, 2) @ by_head

    def layer(self, output: Tensor) -> Tensor:
        """|W_O o|^2 of the whole layer: [query heads, queries, dim] -> [queries]."""
        written = output.transpose(0, 1).flatten(1).float() @ self.weight.T
        if self.split:
            written = sum_over_ranks(written)
        return written.square().sum(-1)

    def heads(self, output: Tensor) -> Tensor:
        """|W_O o|^2 of each query head: [query heads, queries, dim] -> [query heads, queries]."""
        return _quadratic(output.float(), self.head_gram)

    def groups(self, output: Tensor) -> Tensor:
        """|W_O o|^2 of all query heads of a KV head together: [query heads, queries, dim] -> [KV heads, queries]."""
        kv_heads = self.group_gram.shape[0]
        grouped = output.view(kv_heads, -1, *output.shape[1:]).transpose(1, 2).flatten(2)
        return _quadratic(grouped.float(), self.group_gram)


def _quadratic(vectors: Tensor, gram: Tensor) -> Tensor:
    return torch.einsum("hqd,hqd->hq", vectors @ gram, vectors).clamp(min=0)
