"""What headsink needs to know of a model: its attention layers, the shape of their heads, and a fingerprint.

A model qualifies if it is a causal decoder whose attention goes through transformers' `AttentionInterface` and has an
output projection called `o_proj`. That is most families since Llama; the others are refused with the reason.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

from headsink.errors import HeadsinkError
from headsink.sharding import whole_parameter

SAMPLED_WEIGHTS = 64  # values of each parameter that go into the fingerprint


@dataclass(frozen=True)
class Architecture:
    """The heads of a model.

    windows: per layer the model's own sliding window, None where it sees all. softcap: attention logits are capped (Gemma 2).
    uncapped: but the attention that the model was given, `sdpa`, does not. learned_sinks: a learned logit takes part in every
    softmax (gpt-oss). prefix_free: positions are encoded without regard to how long the text is, so that the beginning of a
    long text is computed as the short text would be.
    """

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    max_context: int
    softcap: bool = False
    uncapped: bool = False
    learned_sinks: bool = False
    prefix_free: bool = True

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads


def check_class(model_class: type, name: str) -> None:
    """Raise if models of this class cannot be used, before their weights are read."""
    if not getattr(model_class, "_supports_attention_backend", False) or not model_class._can_set_attn_implementation():  # type: ignore[attr-defined]
        raise HeadsinkError(
            f"{name}: {model_class.__name__} computes attention by itself, not through transformers' AttentionInterface; "
            "headsink cannot see its heads"
        )


def check_config(config: Any, name: str) -> None:
    """Raise if the configuration describes something other than a plain causal decoder."""
    config = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or config.model_type in _ENCODERS:
        raise HeadsinkError(f"{name}: {config.model_type} is an encoder; headsink works on causal decoders only")
    kinds = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention", "sliding_attention"}
    if kinds:
        raise HeadsinkError(f"{name}: {config.model_type} has layers of kind {', '.join(sorted(kinds))}; not supported")


_ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "camembert", "deberta", "albert", "rembert", "modernbert"}


def describe(model: nn.Module) -> Architecture:
    """Read the shape of the heads of a transformers causal language model."""
    config: Any = model.config
    name = type(model).__name__
    if not hasattr(config, "get_text_config"):
        raise HeadsinkError(f"{name} is not a transformers model")
    check_class(type(model), name)
    check_config(config, name)
    config = config.get_text_config(decoder=True)
    kinds, arguments = get_layer_types_and_kwargs(config)
    query_heads, softcap = config.num_attention_heads, bool(getattr(config, "attn_logit_softcapping", None))
    return Architecture(
        name=name,
        layers=len(kinds),
        query_heads=query_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
        windows=tuple(a.get("sliding_window") for a in arguments),
        max_context=config.max_position_embeddings,
        softcap=softcap,
        uncapped=softcap and config._attn_implementation == "sdpa",
        learned_sinks=any(hasattr(m, "layer_idx") and hasattr(m, "sinks") for m in model.modules()),
        prefix_free=not _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"},
    )


def _rope_types(parameters: Any) -> set[str]:
    """The kinds of rotary position encoding in a configuration, which has one or one for each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = set().union(*(_rope_types(value) for value in parameters.values()))
    return nested | ({parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set())


def check_plannable(shape: Architecture) -> None:
    """Raise if the model itself computes something else than it would under a plan that keeps everything."""
    if shape.uncapped:
        raise HeadsinkError(
            f"{shape.name} caps its attention logits, but not with sdpa: call model.set_attn_implementation('eager')"
        )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention module of every layer, in order."""
    shape = describe(model)
    found: dict[Any, nn.Module] = {
        m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")
    }
    if sorted(found) != list(range(shape.layers)):
        raise HeadsinkError(f"{shape.name}: no output projection `o_proj` in every attention layer; not supported")
    return [found[index] for index in range(shape.layers)]


def decoder(model: nn.Module) -> nn.Module:
    """The stack of layers inside a causal language model: what takes the cache and gives hidden states."""
    return model.get_decoder()  # type: ignore[operator]


def weights_hash(model: nn.Module, linears: bool = True) -> str:
    """SHA-256 over a fixed sample of every parameter, rounded to bfloat16.

    The same for a checkpoint loaded in float32 or bfloat16, in one piece, over devices, offloaded, or split over
    processes (all of which must ask); another checkpoint of the same shape differs. linears: with the matrices of linear
    layers; without them it is also the same for a checkpoint whose linear layers are quantised.
    """
    digest = hashlib.sha256()
    for name in hashed_names(model, linears):
        with whole_parameter(model, name) as parameter:
            digest.update(weight_sample(name, parameter.dequantize() if is_quantised(parameter) else parameter))
    return digest.hexdigest()


def hashed_names(model: nn.Module, linears: bool = True) -> list[str]:
    """Names of the parameters that go into `weights_hash`, in order."""
    # An offloaded model has tied weights twice, one in memory once.
    left_out = set(getattr(model, "all_tied_weights_keys", {}))
    if not linears:
        left_out |= _matrices(model)
    return sorted(name for name, _ in model.named_parameters() if name not in left_out)


def weight_sample(name: str, weight: torch.Tensor) -> bytes:
    """What goes into `weights_hash` of one parameter."""
    flat = weight.flatten()
    sample = flat[_sampled(flat.numel()).to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu()
    return f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes()


@lru_cache
def _sampled(values: int) -> torch.Tensor:
    """Which of so many values are sampled: int64."""
    return torch.linspace(0, values - 1, min(SAMPLED_WEIGHTS, values), dtype=torch.float64).long()


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether it is one of torchao's tensors, which compute in their own way."""
    return type(parameter.data).__module__.startswith("torchao")


def has_quantised_linears(model: nn.Module) -> bool:
    return any(is_quantised(model.get_parameter(name)) for name in _matrices(model))


def _matrices(model: nn.Module) -> set[str]:
    """Names of the matrices of linear layers. The output layer is one even if it is the embedding."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight" for name in linears}
