"""Attention over first blocks and a window by vLLM's own kernels: what they are told is where the keys are.

Take a block of queries. What they see (blocks.py) are a few blocks at the beginning and a few that end with their own, all
of the text before them but a gap. Written next to each other in a block table, these blocks are a short text, and plain
causal attention over it is what is wanted: rotary positions are in the keys already. So `compact` cuts every chunk
of a request where a block ends and gives the kernel one short request per piece.

All counts come from what vLLM knows on the host; only the block table is read on the device. So nothing waits for a GPU.
`get_cudagraph_support` says NEVER, as vLLM's own chunked attention does: attention runs between the pieces of a graph.
The code for GPUs is the same, but was not run on one (untested).
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
    """A batch whose requests are pieces of at most `whole` tokens, each with a block table of the keys that it sees.

    whole: tokens of the blocks that are kept or let go; block: of those in the block table, a divisor of it.
    """
    assert blocks.back is not None
    assert batch.seq_lens_cpu_upper_bound is not None
    starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].long()
    ends = batch.seq_lens_cpu_upper_bound[: batch.num_reqs].long()  # exact, for nothing is drafted
    tokens = starts.diff()
    begins = ends - tokens  # position of the first query
    pieces = torch.where(tokens > 0, (ends - 1).div(whole, rounding_mode="floor") - begins // whole + 1, 1)

    request = torch.repeat_interleave(pieces)  # [pieces], as all that follows
    earlier = torch.arange(len(request)) - (pieces.cumsum(0) - pieces)[request]  # pieces of the request before this one
    own = begins[request] // whole + earlier  # the block of the queries
    empty = tokens[request] == 0  # requests that only fill up a batch
    end = torch.minimum(ends[request], (own + 1) * whole)
    queries = (end - torch.maximum(begins[request], own * whole)).masked_fill(empty, 0)
    gap = (own - blocks.back - blocks.sink).clamp(min=0)  # blocks that are not seen
    lengths = (end - gap * whole).masked_fill(empty, 0)

    split = whole // block
    table = batch.block_table_tensor[: batch.num_reqs]
    column = torch.arange(min((blocks.sink + blocks.back + 1) * split, table.shape[1]))
    column = torch.where(column < blocks.sink * split, column, column + gap[:, None] * split)
    column = column.clamp(max=table.shape[1] - 1)

    def there(values: torch.Tensor) -> torch.Tensor:
        return values.to(table.device, non_blocking=True)

    cumulated = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int()
    return batch.replace(
        num_reqs=len(request),
        query_start_loc=there(cumulated),
        query_start_loc_cpu=cumulated,
        seq_lens=there(lengths.int()),
        seq_lens_cpu_upper_bound=lengths.int(),
        max_query_len=int(queries.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table[there(request)].gather(1, there(column)),
        is_prefilling=None
        if batch.is_prefilling is None
        else batch.is_prefilling[request.to(batch.is_prefilling.device)],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def check_planned(spec: Any, names: list[str], layers: Mapping[str, Any]) -> None:
    """Raise if vLLM gives layers another kind of cache than the plan's, as it does where it makes all layers alike."""
    for name in names:
        planned = layers[name].planned
        if planned is not None and (
            not isinstance(spec, SinkWindowSpec)
            or (spec.sink, spec.whole, spec.sliding_window) != (planned.sink, planned.whole, planned.sliding_window)
        ):
            raise HeadsinkError(
                f"{name}: vLLM gave it {type(spec).__name__} instead of the cache that the plan asks for, so the "
                "plan does not hold; start without options that change the KV cache"
            )


@lru_cache
def over_blocks(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend that vLLM chose, for layers that may have a `SinkWindowSpec`."""
    base: Any = backend.get_builder_cls()

    class Builder(base):  # type: ignore[misc]
        supports_update_block_table = False  # a block table does not fit another group's pieces

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
