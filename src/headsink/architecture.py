"""What headsink needs to know of a model: its attention layers, the shape of their heads, and a hash of its weights.

A model qualifies if it is a causal decoder whose attention goes through transformers' `AttentionInterface` and has an
output projection called `o_proj`. That is most families since Llama; the others are refused with the reason. Wrappers around
a model (PEFT's, torch.compile's, DistributedDataParallel's) are seen through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from headsink.errors import HeadsinkError
from headsink.sharding import whole_parameter

SAMPLED_WEIGHTS = 64  # values of each parameter that go into the hash
# What wrappers call the model inside them: torch.compile, DistributedDataParallel, PEFT's models, PEFT's tuners.
INSIDE = ("_orig_mod", "module", "base_model", "model")
# Parts of the names of parameters that a plain model does not have: wrappers of compiled and checkpointed layers, and of layers
# that PEFT has put an adapter around.
WITHIN = {"_orig_mod", "_checkpoint_wrapped_module", "base_layer", "original_module", "token_adapter"}


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


def wrappers(model: nn.Module) -> list[nn.Module]:
    """A model and what it wraps, outermost first; the last is the transformers model."""
    found = [model]
    while not isinstance(found[-1], PreTrainedModel):
        children = dict(found[-1].named_children())
        inside = next((children[name] for name in INSIDE if name in children), None)
        if inside is None:
            raise HeadsinkError(f"{type(model).__name__} is not a transformers model")
        found.append(inside)
    return found


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of PEFT, torch.compile and DistributedDataParallel; itself without any."""
    inside: PreTrainedModel = wrappers(model)[-1]  # type: ignore[assignment]
    return inside


def _class_name(model: PreTrainedModel) -> str:
    """The model's class in transformers. A subclass by others, such as FSDP's, goes by the name of what it extends."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models."):
            return kind.__name__
    return type(model).__name__


def describe(model: nn.Module) -> Architecture:
    """Read the shape of the heads of a transformers causal language model."""
    inside = unwrapped(model)
    config, name = inside.config, _class_name(inside)
    check_class(type(inside), name)
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
        learned_sinks=any(hasattr(m, "layer_idx") and hasattr(m, "sinks") for m in inside.modules()),
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
        m.layer_idx: m for m in unwrapped(model).modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")
    }
    if sorted(found) != list(range(shape.layers)):
        raise HeadsinkError(f"{shape.name}: no output projection `o_proj` in every attention layer; not supported")
    return [found[index] for index in range(shape.layers)]


def decoder(model: nn.Module) -> nn.Module:
    """The stack of layers inside a causal language model: what takes the cache and gives hidden states."""
    return unwrapped(model).get_decoder()


def vocabulary(model: nn.Module) -> int:
    """How many token ids the model knows."""
    return int(unwrapped(model).config.get_text_config(decoder=True).vocab_size)


def weights_hash(model: nn.Module, linears: bool = True) -> str:
    """SHA-256 over a fixed sample of every parameter, rounded to bfloat16.

    The same for a checkpoint loaded in float32 or bfloat16, in one piece, over devices, offloaded, or split over
    processes (all of which must ask); another checkpoint of the same shape differs. Adapters of PEFT count while they are active
    and not merged. linears: with the matrices of linear layers; without them it is also the same for a checkpoint whose linear
    layers are quantised.
    """
    return hash_of(sampled_weights(model, linears))


@dataclass(frozen=True)
class Sampled:
    """Some values of one parameter, in its dtype. matrix: of a linear layer; adapter: of PEFT."""

    name: str
    shape: tuple[int, ...]
    values: Tensor
    matrix: bool = False
    adapter: bool = False

    @classmethod
    def of(cls, name: str, weight: Tensor, **kinds: bool) -> Sampled:
        flat = weight.flatten()
        return cls(name, tuple(weight.shape), flat[_sampled(flat.numel()).to(flat.device)].cpu(), **kinds)

    def hashed(self) -> bytes:
        """What goes into the hash."""
        values = self.values.to(torch.bfloat16).view(torch.int16)
        return f"{self.name} {self.shape}".encode() + values.numpy().tobytes()


def hash_of(weights: Sequence[Sampled]) -> str:
    """`weights_hash` of parameters in the order of their names."""
    return hashlib.sha256(b"".join(weight.hashed() for weight in weights)).hexdigest()


def sampled_weights(model: nn.Module, linears: bool = True) -> list[Sampled]:
    """Some values of every parameter that counts, in the order of their names."""
    inside, found = unwrapped(model), []
    adapters, matrices = _adapters(inside), _matrices(inside)
    for name, path in _counted(inside, linears, adapters).items():
        with whole_parameter(inside, path) as parameter:
            plain = parameter.dequantize() if _is_torchao(parameter) else parameter
            found.append(Sampled.of(name, plain, matrix=path in matrices, adapter=path in adapters))
    for wrapper in wrappers(model)[:-1]:  # prompts that are trained lie outside the model
        found += [Sampled.of(name, weight.detach(), adapter=True) for name, weight in _prompts(wrapper)]
    return sorted(found, key=lambda weight: weight.name)


def hashed_names(model: nn.Module, linears: bool = True) -> list[str]:
    """Names of the parameters that go into `weights_hash`, in order."""
    return list(_counted(model, linears, {}))


def _counted(model: nn.Module, linears: bool, adapters: dict[str, bool]) -> dict[str, str]:
    """Parameters that count, in the order of the names that a plain model has for them: those names, and where they are here."""
    # An offloaded model has tied weights twice, one in memory once.
    tied, matrices = set(getattr(model, "all_tied_weights_keys", {})), set() if linears else _matrices(model)
    paths = [path for path, _ in model.named_parameters() if adapters.get(path, True) and path not in matrices]
    names = {".".join(part for part in path.split(".") if part not in WITHIN): path for path in paths}
    return {name: names[name] for name in sorted(names) if name not in tied}


@lru_cache
def _sampled(values: int) -> Tensor:
    """Which of so many values are sampled: int64."""
    return torch.linspace(0, values - 1, min(SAMPLED_WEIGHTS, values), dtype=torch.float64).long()


def _adapters(model: nn.Module) -> dict[str, bool]:
    """Names of the parameters of PEFT's adapters, and whether they are active and not merged into the model's own."""
    found = {}
    for path, module in model.named_modules():
        if not getattr(module, "adapter_layer_names", ()):
            continue
        layer: Any = module
        active = set() if layer.disable_adapters else set(layer.active_adapters) - set(layer.merged_adapters)
        for name, _ in layer.named_parameters():
            kind, _, rest = name.partition(".")  # lora_A, default.weight
            if kind not in WITHIN:
                found[f"{path}.{name}"] = rest.partition(".")[0] in active
    return found


def _prompts(wrapper: nn.Module) -> list[tuple[str, Tensor]]:
    """What PEFT's prompt tuning and prefix tuning put before a text."""
    encoders: Any = dict(wrapper.named_children()).get("prompt_encoder")
    if not encoders:
        return []
    active: Any = wrapper.active_adapter
    return [(f"prompt_encoder.{active}.{name}", weight) for name, weight in encoders[active].named_parameters()]


def is_quantised(parameter: Tensor) -> bool:
    """Whether it is one of torchao's tensors, which compute in their own way, or of a type that holds codes."""
    return _is_torchao(parameter) or not parameter.is_floating_point() or parameter.element_size() == 1


def _is_torchao(parameter: Tensor) -> bool:
    return type(parameter.data).__module__.startswith("torchao")


def has_quantised_linears(model: nn.Module) -> bool:
    inside = unwrapped(model)
    return any(is_quantised(inside.get_parameter(name)) for name in _matrices(inside))


def _matrices(model: nn.Module) -> set[str]:
    """Names of the matrices of linear layers, with what scales their codes; not of adapters. The output layer is one even if it
    is the embedding."""
    linears = (found for found in model.named_modules() if isinstance(found[1], nn.Linear))
    own = (f"{path}.{name}" for path, module in linears for name, _ in module.named_parameters(recurse=False))
    return {name for name in own if not name.endswith(".bias")} - set(_adapters(model))
