"""A KV cache spec and manager for vLLM that keep sink blocks and a window of blocks.

`SinkWindowSpec` describes the cache of a layer (here: one KV head). vLLM's scheduler asks `SinkWindowManager` which blocks to
free, and which blocks of an earlier request with the same prefix to reuse. Importing this module registers both with vLLM, in
whichever process unpickles such a spec first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from headsink.serving.vllm.blocks import Blocks


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A cache of the first `sink` tokens and a window, in whole blocks of `whole` tokens (blocks.py).

    sliding_window: back * whole + 1 tokens, the window of the first query of a block. For kernels with smaller blocks vLLM
    changes `block_size`, not `whole`.
    """

    sink: int
    whole: int

    @classmethod
    def of(cls, blocks: Blocks, block: int, **fields: Any) -> SinkWindowSpec:
        assert blocks.back is not None
        window = blocks.back * block + 1
        return cls(block_size=block, whole=block, sink=blocks.sink * block, sliding_window=window, **fields)

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.sink // self.whole, (self.sliding_window - 1) // self.whole)

    @property
    def num_retained_tokens(self) -> int:
        """0: vLLM's model runner (from 0.33 on) leaves the blocks below the window in place, among them the sink blocks."""
        return 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Return the peak number of blocks of one request. A chunk holds all of its blocks until the step after it."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(window + self.sink // self.block_size, -(-max_model_len // self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class SinkWindowManager(SlidingWindowManager):
    """Free the blocks between the sink blocks and the window."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        del num_prompt_tokens
        kept: Blocks = self.kv_cache_spec.blocks
        assert kept.back is not None
        self._remove_blocks_in_range(request_id, kept.sink, processed_computed_tokens // self.block_size - kept.back)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Return 0: the sequence's beginning is kept, and a prefix-cache hit already has null blocks in the gap."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: SinkWindowSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **ranks: int,
    ) -> tuple[tuple[list[Any], ...], int]:
        """Return vLLM's hit for the window if the sink blocks are cached too, else no blocks and length 0."""
        found, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **ranks,
        )
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size, alignment_tokens=alignment_tokens
        )
        for n in range(min(kv_cache_spec.blocks.sink, len(found[0]))):
            first = block_pool.get_cached_block(hashes[n], kv_cache_group_ids)
            if not first:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, first, strict=True):
                blocks[n] = block
        return found, length

    @classmethod
    def reachable_block_mask(cls, *args: Any, **options: Any) -> Sequence[bool] | None:
        """Return None: every block can serve a later request."""
        return None


KVCacheSpecRegistry._ensure_registered()  # else vLLM takes a non-empty registry for complete and does not add its own specs
KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SinkWindowSpec)
