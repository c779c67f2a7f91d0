"""Attention over sink blocks and a window of blocks with vLLM's own kernels, by rewriting their metadata.

The queries of one block attend to a few blocks at the beginning of the sequence and a few that end with their own (blocks.py),
with a gap between. If these blocks are adjacent in a block table, they form a short sequence, and plain causal attention over it
gives the result, because rotary positions are already applied to the cached keys. `compact` therefore splits every chunk of a
request at block boundaries and gives the kernel one short request per piece.

All counts come from metadata on the host; only the block table is read on the device, so nothing waits for a GPU.
`get_cudagraph_support` returns NEVER, like vLLM's chunked local attention: attention runs between the pieces of a graph.
The same code should run on GPUs; it is untested there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from headsink.errors import HeadsinkError
from headsink.serving.vllm.blocks import Blocks
from headsink.serving.vllm.kv_cache import SinkWindowSpec


def compact(batch: CommonAttentionMetadata, blocks: Blocks, whole: int, block: int) -> CommonAttentionMetadata:
    """Split the requests of a batch into pieces of at most `whole` tokens, each with a block table of its visible keys only.

    whole: tokens per block of the eviction rule. block: tokens per block of the block table, a divisor of `whole`.
    """
    assert blocks.back is not None
    assert batch.seq_lens_cpu_upper_bound is not None
    starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].long()
    ends = batch.seq_lens_cpu_upper_bound[: batch.num_reqs].long()  # exact, because speculative decoding is refused
    tokens = starts.diff()
    begins = ends - tokens  # position of the first query
    pieces = torch.where(tokens > 0, (ends - 1).div(whole, rounding_mode="floor") - begins // whole + 1, 1)

    request = torch.repeat_interleave(pieces)  # index of each piece's request: [pieces], like all tensors below
    earlier = torch.arange(len(request)) - (pieces.cumsum(0) - pieces)[request]  # index of the piece in its request
    own = begins[request] // whole + earlier  # block of the piece's queries
    empty = tokens[request] == 0  # padding requests
    end = torch.minimum(ends[request], (own + 1) * whole)
    queries = (end - torch.maximum(begins[request], own * whole)).masked_fill(empty, 0)
    gap = (own - blocks.back - blocks.sink).clamp(min=0)  # number of blocks that are not visible
    lengths = (end - gap * whole).masked_fill(empty, 0)

    split = whole // block
    table = batch.block_table_tensor[: batch.num_reqs]
    column = torch.arange(min((blocks.sink + blocks.back + 1) * split, table.shape[1]))
    column = torch.where(column < blocks.sink * split, column, column + gap[:, None] * split)
    column = column.clamp(max=table.shape[1] - 1)

    def to_device(values: torch.Tensor) -> torch.Tensor:
        return values.to(table.device, non_blocking=True)

    query_starts = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int()
    return batch.replace(
        num_reqs=len(request),
        query_start_loc=to_device(query_starts),
        query_start_loc_cpu=query_starts,
        seq_lens=to_device(lengths.int()),
        seq_lens_cpu_upper_bound=lengths.int(),
        max_query_len=int(queries.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table[to_device(request)].gather(1, to_device(column)),
        is_prefilling=None
        if batch.is_prefilling is None
        else batch.is_prefilling[request.to(batch.is_prefilling.device)],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def check_planned(spec: Any, names: list[str], layers: Mapping[str, Any]) -> None:
    """Raise HeadsinkError if vLLM gives a layer another cache spec than the plan's, as it does where it unifies all layers."""
    for name in names:
        planned = layers[name].planned
        if planned is not None and (
            not isinstance(spec, SinkWindowSpec)
            or (spec.sink, spec.whole, spec.sliding_window) != (planned.sink, planned.whole, planned.sliding_window)
        ):
            raise HeadsinkError(
                f"{name}: vLLM uses {type(spec).__name__} instead of the cache that the plan needs, so the plan would "
                "not be applied; start without options that change the KV cache"
            )


@lru_cache
def over_blocks(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """Return a subclass of the backend that vLLM chose, for layers that may have a `SinkWindowSpec`."""
    base: Any = backend.get_builder_cls()

    class Builder(base):  # type: ignore[misc]
        supports_update_block_table = False  # groups with the same spec are split into different pieces

        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, *args: Any, **options: Any
        ) -> None:
            check_planned(kv_cache_spec, layer_names, vllm_config.compilation_config.static_forward_context)
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **options)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            return AttentionCGSupport.NEVER

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            spec = self.kv_cache_spec
            if isinstance(spec, SinkWindowSpec):
                common_attn_metadata = compact(common_attn_metadata, spec.blocks, spec.whole, spec.block_size)
            return super().build(0, common_attn_metadata, fast_build)

    return subclass_attention_backend("Headsink", backend, Builder)
