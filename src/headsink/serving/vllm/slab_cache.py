"""vLLM's cache spec and block manager of the slab (slab.py): a sequence takes blocks by its length alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from headsink.serving.vllm.slab import blocks_for


@dataclass(frozen=True, kw_only=True)
class SlabSpec(AttentionSpec):
    """The slab's blocks, the same for every layer. needs: as in `Slab`. dense: prompts are read in full attention."""

    needs: tuple[int, ...]
    dense: bool

    @property
    def prefix_cacheable(self) -> bool:
        """False: keys of a block are overwritten, so it does not belong to the tokens that filled it."""
        return False

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        del vllm_config
        return max(self.most_blocks(max_len), cdiv(max_len, self.block_size))  # the worker computes slots by position

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.most_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def most_blocks(self, tokens: int) -> int:
        """Return the largest number of blocks that a sequence has at once."""
        return blocks_for(self.needs, tokens) + self.blocks_of_prompt(tokens)

    def blocks_of_prompt(self, tokens: int) -> int:
        """Return the number of blocks for tokens of a prompt that is being read."""
        return cdiv(tokens, self.block_size) if self.dense else 0

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class SlabManager(FullAttentionManager):
    """Gives a sequence the blocks that slab.py describes."""

    def __init__(self, kv_cache_spec: SlabSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.spec = kv_cache_spec
        self.prompts: dict[str, int] = {}  # tokens of the prompts, or of the prefixes from which requests started
        self.reading: dict[str, int] = {}  # blocks for prompts while they are read
        self.tokens: dict[str, int] = {}  # of sequences
        self.held: dict[str, int] = {}  # blocks of sequences

    def _missing(self, request_id: str, num_tokens: int, prefix: int = 0) -> int:
        """Return how many blocks a request needs more. prefix: tokens of the prefix from which it can start."""
        spec, prompt = self.spec, self.prompts.get(request_id)
        if not spec.dense or (prompt is None and prefix):
            wanted = blocks_for(spec.needs, num_tokens)
        elif prompt is None:  # the question whether the request can start
            wanted = spec.most_blocks(num_tokens)
        elif num_tokens < prompt:
            wanted = blocks_for(spec.needs, prompt) + spec.blocks_of_prompt(num_tokens)
        else:
            wanted = blocks_for(spec.needs, num_tokens) + self.reading.get(request_id, 0)
        return max(0, wanted - len(self.req_to_blocks.get(request_id, ())))

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Any, total_computed_tokens: int, *_: Any, **__: Any
    ) -> int:
        return self._missing(request_id, num_tokens, total_computed_tokens)

    def allocate_external_computed_blocks(self, *_: Any, **__: Any) -> None:
        """Do nothing: `allocate_new_blocks` also takes the blocks of a prefix."""

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        del num_tokens_main_model
        new = self.block_pool.get_new_blocks(self._missing(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(new)
        self.tokens[request_id] = num_tokens
        self.held[request_id] = self.held.get(request_id, 0) + len(new)
        if num_tokens < self.prompts.get(request_id, 0):
            self.reading[request_id] = self.spec.blocks_of_prompt(num_tokens)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return list(new)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks for the prompt once it is read. vLLM calls this before it allocates blocks."""
        assert num_prompt_tokens is not None
        if not self.req_to_blocks.get(request_id):  # it starts; tokens that are known already are a prefix
            self.prompts[request_id] = processed_computed_tokens or num_prompt_tokens
        prompt = self.prompts[request_id]
        if processed_computed_tokens >= prompt and request_id in self.held:
            first = blocks_for(self.spec.needs, prompt)
            before = self.block_pool.get_num_free_blocks()
            self._remove_blocks_in_range(request_id, first, first + self.reading.get(request_id, 0))
            self.held[request_id] -= self.block_pool.get_num_free_blocks() - before

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        for numbers in (self.prompts, self.reading, self.tokens, self.held):
            numbers.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def usage(self) -> tuple[int, int]:
        """Return how many blocks the sequences hold, and how many they would hold without a plan."""
        return sum(self.held.values()), sum(cdiv(tokens, self.block_size) for tokens in self.tokens.values())

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Sequence[int], *_: Any, **__: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0


KVCacheSpecRegistry._ensure_registered()  # else vLLM takes a non-empty registry for complete and does not add its own specs
KVCacheSpecRegistry.register(SlabSpec, SlabManager, uniform_type_base_spec=SlabSpec)
