"""vLLM's cache spec and block manager of the slab (slab.py): a sequence takes blocks by its length alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from headsink.serving.vllm.slab import blocks_for


@dataclass(frozen=True, kw_only=True)
class SlabSpec(AttentionSpec):
    """The slab's blocks, the same for every layer. needs: as in `Slab`."""

    needs: tuple[int, ...]

    @property
    def prefix_cacheable(self) -> bool:
        """False: keys of a block are overwritten, so it does not belong to the tokens that filled it."""
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return blocks_for(self.needs, vllm_config.model_config.max_model_len) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class SlabManager(FullAttentionManager):
    """Gives a sequence as many blocks as the slab needs."""

    def _missing(self, request_id: str, num_tokens: int) -> int:
        spec: Any = self.kv_cache_spec
        return max(0, blocks_for(spec.needs, num_tokens) - len(self.req_to_blocks.get(request_id, ())))

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *_: Any, **__: Any) -> int:
        return self._missing(request_id, num_tokens)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        del num_tokens_main_model
        new = self.block_pool.get_new_blocks(self._missing(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return list(new)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Sequence[int], *_: Any, **__: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0


KVCacheSpecRegistry._ensure_registered()  # else vLLM takes a non-empty registry for complete and does not add its own specs
KVCacheSpecRegistry.register(SlabSpec, SlabManager, uniform_type_base_spec=SlabSpec)
