"""vLLM's KV connector for prefixes (prefixes.py): a request whose prompt begins with one starts after it.

In the scheduler's process it says how many tokens of a prompt are known. In a worker it names the sequences that start from a
prefix, and the attention writes the prefix into their blocks before the step (slab_attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from headsink.runtime.prefix import prefix_tokens
from headsink.serving.vllm.prefixes import Prefix, find
from headsink.serving.vllm.settings import PREFIXES


@dataclass
class Starts(KVConnectorMetadata):
    """The sequences that start from a prefix in a step: the first block of each, and the number of the prefix, counted from 1."""

    loads: list[tuple[int, int]]


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.starts: list[tuple[int, int]] = []
        files = self._kv_transfer_config.kv_connector_extra_config[PREFIXES]
        if role is KVConnectorRole.SCHEDULER:
            self.prefixes = [prefix_tokens(file) for file in files]
        else:
            layers = vllm_config.compilation_config.static_forward_context.values()
            running = self.running = next(layer.running for layer in layers if hasattr(layer, "slab"))
            given = running.plan, running.shape, running.slab, running.heads, vllm_config.model_config.dtype
            running.prefixes = [Prefix.load(file, *given) for file in files]

    # in the scheduler's process

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        found = None if num_computed_tokens else find(self.prefixes, request.prompt_token_ids or ())
        return (0 if found is None else len(self.prefixes[found])), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            number = find(self.prefixes, request.prompt_token_ids)
            assert number is not None
            self.starts.append((blocks.get_block_ids()[0][0], number + 1))

    def build_connector_meta(self, scheduler_output: Any) -> Starts:
        del scheduler_output
        starts, self.starts = self.starts, []
        return Starts(starts)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        del request, block_ids
        return False, None

    # in a worker

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """vLLM calls this before each step, before it makes the metadata of the attention."""
        assert isinstance(kv_connector_metadata, Starts)
        self.running.loads += kv_connector_metadata.loads

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
