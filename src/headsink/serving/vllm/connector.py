"""vLLM's KV connector for the slab (slab.py): requests that start from a prefix (prefixes.py), and metrics.

In the scheduler's process it says how many tokens of a prompt are known, and how many blocks are held. In a worker it names the
sequences that start from a prefix; the attention writes the prefix into their blocks before the step (slab_attention.py). In the
server's process it exports the metrics.
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
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from headsink.errors import HeadsinkError
from headsink.runtime.prefix import prefix_tokens
from headsink.serving.vllm.prefixes import Prefix, find
from headsink.serving.vllm.settings import PREFIXES
from headsink.serving.vllm.slab_cache import SlabManager, SlabSpec

GAUGES = {  # vLLM shows and removes metrics that begin like its own
    "vllm:headsink_kv_blocks": "Blocks that running sequences hold for the layers of the plan.",
    "vllm:headsink_kv_blocks_full_cache": "Blocks that running sequences would hold for these layers without a plan.",
}


@dataclass
class Starts(KVConnectorMetadata):
    """The sequences that start from a prefix in a step: the first block of each, and the number of the prefix, counted from 1."""

    loads: list[tuple[int, int]]


@dataclass
class Usage(KVConnectorStats):
    """The values of `GAUGES` by name."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return other  # the later one

    def reduce(self) -> dict[str, int | float]:
        return {name.removeprefix("vllm:"): value for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class Metrics(KVConnectorPromMetrics):
    def __init__(
        self, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], labels: dict[int, list[object]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, labels)
        self.gauges = {name: self._gauge_cls(name, text, labelnames) for name, text in GAUGES.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, gauge in self.gauges.items():
            gauge.labels(*self.per_engine_labelvalues[engine_idx]).set(transfer_stats_data[name])


class SlabConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.starts: list[tuple[int, int]] = []
        files = self._kv_transfer_config.kv_connector_extra_config[PREFIXES]
        if role is KVConnectorRole.SCHEDULER:
            self.prefixes = [prefix_tokens(file) for file in files]
        else:
            layers = vllm_config.compilation_config.static_forward_context.values()
            running = self.running = next(layer.running for layer in layers if hasattr(layer, "slab"))
            groups = sum(isinstance(group.kv_cache_spec, SlabSpec) for group in kv_cache_config.kv_cache_groups)
            if groups > 1:
                raise HeadsinkError(
                    "vLLM divides the layers with full attention of this model into several groups, which a plan with top-k keys "
                    "does not support; make one with `headsink plan --no-top-k`"
                )
            given = running.plan, running.shape, running.slab, running.heads
            dtypes = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
            running.prefixes = [Prefix.load(file, *given, *dtypes) for file in files]

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

    def get_kv_connector_stats(self) -> Usage | None:
        if self._kv_cache_manager is None:  # in a worker
            return None
        managers = self._kv_cache_manager.coordinator.single_type_managers
        (slab,) = (manager for manager in managers if isinstance(manager, SlabManager))
        return Usage(dict(zip(GAUGES, slab.usage(), strict=True)))

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        del request, block_ids
        return False, None

    # in a worker

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Take the sequences of a step. vLLM calls this first in each step, before it makes the metadata of the attention."""
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

    # in the server's process

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Usage:
        return Usage(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> Metrics:
        return Metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
