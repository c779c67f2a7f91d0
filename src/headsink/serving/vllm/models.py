"""vLLM model classes that run a plan; one implementation serves all families, because all call `self.attn(q, k, v)`.

vLLM builds the model; then the `Attention` of its layers is replaced. Under a plan with top-k keys all layers with full attention
share a slab (`SlabAttention`). Under other plans every layer gets an `Attention` per KV head (`SplitAttention`), so that each
head has its own blocks. Sliding-window layers are split too, with their own window: vLLM gives all layers blocks of the same size
in bytes, and would otherwise use longer blocks for single heads. A plan of full heads only leaves the model unchanged. The
weights are hashed while they load, and the hash is compared with the plan's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import gemma3, gpt_oss, llama, mistral, mixtral, olmoe, qwen2, qwen3, qwen3_moe
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import get_dtype_size, kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import KVCacheSpec, is_quantized_kv_cache

from headsink.errors import HeadsinkError
from headsink.eviction.scorers import SCORERS
from headsink.models.distributed import rank_heads
from headsink.models.rope import Rotary
from headsink.models.spec import Architecture, describe
from headsink.plan.plan import Plan
from headsink.serving.vllm.attention import over_blocks
from headsink.serving.vllm.fp8 import FP8, check_processor
from headsink.serving.vllm.groups import Grouping, choose, widest_first
from headsink.serving.vllm.kv_cache import SinkWindowSpec
from headsink.serving.vllm.prefixes import Prefix
from headsink.serving.vllm.settings import CONNECTOR, PREFILL, given_plan, refuse
from headsink.serving.vllm.skeleton import PassingWeights, rotary, skeleton
from headsink.serving.vllm.slab import Slab
from headsink.serving.vllm.slab_attention import over_slab
from headsink.serving.vllm.slab_cache import SlabSpec
from headsink.utils.versions import check_vllm

check_vllm()
logger = init_logger("vllm.headsink")


class Running:
    """A plan in a vLLM worker. The grouping is computed when vLLM asks for cache specs: the block size is final only then."""

    def __init__(self, plan: Plan, shape: Architecture, config: VllmConfig, rotary: Rotary | None) -> None:
        self.plan, self.shape, self.config, self.rotary = plan, shape, config, rotary
        self.dense = config.additional_config.get(PREFILL) != "sparse"
        self.ranks = get_tensor_model_parallel_world_size()
        self.heads = rank_heads(plan.model.kv_heads, self.ranks)[get_tensor_model_parallel_rank()]
        self.prefixes: list[Prefix] = []
        self.loads: list[tuple[int, int]] = []  # the sequences that start from a prefix next (connector.py)

    @cached_property
    def grouping(self) -> Grouping:
        dtype = kv_cache_dtype_str_to_dtype(self.config.cache_config.cache_dtype, self.config.model_config)
        found = choose(
            self.plan,
            self.shape.windows,
            self.config.cache_config.block_size,
            self.config.model_config.max_model_len,
            2 * self.plan.model.head_dim * get_dtype_size(dtype),
            self.ranks,
        )
        logger.info("%s", found)
        return found

    @cached_property
    def slab(self) -> Slab:
        found = Slab.of(
            self.plan,
            self.config.model_config.max_model_len,
            self.config.cache_config.block_size,
            self.ranks,
            get_tensor_model_parallel_rank(),
        )
        logger.info("%s", found)
        return found

    def order(self, layer: int) -> list[int]:
        """Return which of this rank's heads each unit of a layer runs, in the order of `groups.choose`."""
        heads = self.plan.layers[layer]
        if heads is None:
            return list(range(len(self.heads)))
        return widest_first([head.pattern.widen(self.plan.decode_window) for head in heads], self.heads)


class HeadAttention(Attention):
    """Attention of one KV head, with the blocks that the grouping gives it."""

    def __init__(self, running: Running, layer: int, unit: int, like: Attention, **options: Any) -> None:
        super().__init__(**options, attn_backend=over_blocks(like.attn_backend))
        self.running, self.layer, self.unit = running, layer, unit
        # The spec that was requested; `check_planned` compares it with the one that vLLM uses.
        self.planned: SinkWindowSpec | None = None

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        units = self.running.grouping.units[self.layer]
        assert units is not None
        if units[self.unit].back is None:
            return super().get_kv_cache_spec(vllm_config)
        self.planned = SinkWindowSpec.of(
            units[self.unit],
            vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
        )
        return self.planned


class SlabAttention(Attention):
    """Attention of a layer whose keys are in the slab (slab.py)."""

    def __init__(self, whole: Attention, layer: int, running: Running) -> None:
        super().__init__(
            num_heads=whole.num_heads,
            head_size=whole.head_size,
            scale=whole.impl.scale,
            num_kv_heads=whole.num_kv_heads,
            cache_config=running.config.cache_config,
            quant_config=running.config.quant_config,
            prefix=whole.layer_name,
            attn_backend=over_slab(whole.attn_backend),
            sinks=whole.impl.sinks,
        )
        self.running, self.rotary, self.scorer = running, running.rotary, SCORERS[running.plan.scorer]
        self.number = sum(heads is not None for heads in running.plan.layers[:layer])  # among the layers of the slab
        self.register_buffer("scorer_weights", running.plan.scores(layer)[running.heads], persistent=False)

    @property
    def slab(self) -> Slab:
        return self.running.slab

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return SlabSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            needs=self.slab.needs,
            dense=self.running.dense,
        )


class SplitAttention(nn.Module):
    """Replacement of a layer's `Attention`, with one `Attention` per KV head.

    query: [tokens, query heads * dim]; key, value: [tokens, KV heads * dim]; returns [tokens, query heads * dim].
    """

    def __init__(self, whole: Attention, layer: int, running: Running) -> None:
        super().__init__()
        self.kv_heads = whole.num_kv_heads
        self.order = running.order(layer)
        options: dict[str, Any] = {
            "num_heads": whole.num_heads // whole.num_kv_heads,
            "head_size": whole.head_size,
            "scale": whole.impl.scale,
            "num_kv_heads": 1,
            "cache_config": running.config.cache_config,
            "quant_config": running.config.quant_config,
        }
        self.units = nn.ModuleList()
        # Views, so that they have the values that the model loads.
        sinks = [None] * self.kv_heads if whole.impl.sinks is None else whole.impl.sinks.detach().chunk(self.kv_heads)
        for unit in range(self.kv_heads):
            options["sinks"] = sinks[self.order[unit]]
            name = f"{whole.layer_name}.unit{unit}"
            if running.plan.layers[layer] is None:
                options |= {"per_layer_sliding_window": whole.sliding_window, "attn_backend": whole.attn_backend}
                self.units.append(Attention(prefix=name, **options))
            else:
                self.units.append(HeadAttention(running, layer, unit, whole, prefix=name, **options))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part.unflatten(1, (self.kv_heads, -1)) for part in (query, key, value))
        output = torch.empty_like(query)
        for head, unit in zip(self.order, self.units, strict=True):
            output[:, head] = unit(query[:, head].contiguous(), key[:, head].contiguous(), value[:, head].contiguous())
        return output.flatten(1)


def run(model: nn.Module, plan: Plan, like: PreTrainedModel, config: VllmConfig) -> None:
    """Make a vLLM model run a plan. Call it before its weights are loaded. like: the model in transformers, on any device.

    Raises HeadsinkError for layers that differ from the plan's.
    """
    if _keeps_all(plan):
        return
    shape = describe(like)
    running = Running(plan, shape, config, rotary(like) if plan.has_top_k else None)
    if plan.has_top_k and running.dense:
        # With a value here vLLM's runner passes the lengths of prompts on to the attention; nothing of this model uses the value.
        config.model_config.model_arch_config.rswa_window = 1
    context = config.compilation_config.static_forward_context
    layers = []
    for parent in list(model.modules()):
        for name, whole in list(parent.named_children()):
            if type(whole) is not Attention:
                continue
            layer = extract_layer_index(whole.layer_name)
            if whole.sliding_window != shape.windows[layer]:
                windows = f"{whole.sliding_window} in vLLM and of {shape.windows[layer]} in its configuration"
                raise HeadsinkError(f"layer {layer} has a window of {windows}")
            layers.append(layer)
            if plan.has_top_k and plan.layers[layer] is None:
                continue
            del context[whole.layer_name]
            replace = SlabAttention if plan.has_top_k else SplitAttention
            setattr(parent, name, replace(whole, layer, running))
    if sorted(layers) != list(range(len(plan.layers))):
        raise HeadsinkError(
            f"vLLM has attention in the layers {sorted(layers)}; the plan has {len(plan.layers)} layers"
        )


def _keeps_all(plan: Plan) -> bool:
    return all(head.pattern.full for layer in plan.layers for head in layer or ())


def _check_settings(plan: Plan, config: VllmConfig) -> None:
    """Raise HeadsinkError for features of vLLM that do not work with a plan, or are untested with one."""
    if _keeps_all(plan):
        return
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    quantised = is_quantized_kv_cache(config.cache_config.cache_dtype)
    unsuitable = {
        "on a GPU": not current_platform.is_cpu(),
        "of another kind than fp8": config.cache_config.cache_dtype not in FP8,
        "in some layers alone": bool(config.cache_config.kv_cache_dtype_skip_layers),
        "of a quantised model": config.quant_config is not None,  # whose scales the layers of a plan would not get
    }
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "KV transfer and KV offloading": transfer is not None and transfer.kv_connector_module_path != CONNECTOR,
        "a LoRA adapter": config.lora_config is not None,  # makes other weights than the plan's
        **{f"a quantised KV cache {where}": quantised and wrong for where, wrong in unsuitable.items()},
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
        "--disable-hybrid-kv-cache-manager": config.scheduler_config.disable_hybrid_kv_cache_manager,
    }
    if plan.has_top_k:
        refused["prefix caching"] = bool(config.cache_config.enable_prefix_caching)
    refuse(refused)
    if quantised:
        check_processor()


def _with_plan(base: Any) -> Any:
    class WithPlan(base):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
            plan = given_plan(vllm_config.additional_config)
            _check_settings(plan, vllm_config)  # first, because layers of vLLM refuse some of them in other words
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            self.plan = plan
            self.skeleton = [skeleton(vllm_config.model_config.hf_config)]  # in a list, so that it is not a submodule
            self.plan.check_shape(describe(self.skeleton[0]))
            self.quantised = vllm_config.quant_config is not None
            run(self, self.plan, self.skeleton[0], vllm_config)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            passing = PassingWeights(self.skeleton.pop(), self.quantised)
            loaded = super().load_weights(passing.watch(weights))
            self.plan.check_weights(passing.hash(), "unquantised" if self.quantised else "weights")
            return loaded

    WithPlan.__name__ = WithPlan.__qualname__ = base.__name__
    return WithPlan


Gemma3ForCausalLM = _with_plan(gemma3.Gemma3ForCausalLM)
GptOssForCausalLM = _with_plan(gpt_oss.GptOssForCausalLM)
LlamaForCausalLM = _with_plan(llama.LlamaForCausalLM)
MistralForCausalLM = _with_plan(mistral.MistralForCausalLM)
MixtralForCausalLM = _with_plan(mixtral.MixtralForCausalLM)
OlmoeForCausalLM = _with_plan(olmoe.OlmoeForCausalLM)
Qwen2ForCausalLM = _with_plan(qwen2.Qwen2ForCausalLM)
Qwen3ForCausalLM = _with_plan(qwen3.Qwen3ForCausalLM)
Qwen3MoeForCausalLM = _with_plan(qwen3_moe.Qwen3MoeForCausalLM)
