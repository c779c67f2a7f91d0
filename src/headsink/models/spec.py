"""What headsink needs to know of a model: its attention layers, the shape of their heads, and a hash of its weights.

A model qualifies if it is a causal decoder whose attention goes through transformers' `AttentionInterface` and has an
output projection called `o_proj`. That is most families since Llama; the others are refused with the reason. Wrappers around
a model (PEFT's, torch.compile's, DistributedDataParallel's) are seen through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from headsink.errors import HeadsinkError
from headsink.models.families import ENCODERS

# What wrappers call the model inside them: torch.compile, DistributedDataParallel, PEFT's models, PEFT's tuners.
INSIDE = ("_orig_mod", "module", "base_model", "model")
# Parts of the names of parameters that a plain model does not have: wrappers of compiled and checkpointed layers, and of layers
# that PEFT has put an adapter around.
WITHIN = {"_orig_mod", "_checkpoint_wrapped_module", "base_layer", "original_module", "token_adapter"}


@dataclass(frozen=True)
class Architecture:
    """The heads of a model.

    windows: per layer the model's own sliding window, None where it sees all. softcap: attention logits are capped (Gemma 2).
    uncapped: but the attention that the model was given, `sdpa`, does not. has_sink_logits: a learned logit takes part in every
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
    has_sink_logits: bool = False
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
    if config.is_encoder_decoder or config.model_type in ENCODERS:
        raise HeadsinkError(f"{name}: {config.model_type} is an encoder; headsink works on causal decoders only")
    kinds = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention", "sliding_attention"}
    if kinds:
        raise HeadsinkError(f"{name}: {config.model_type} has layers of kind {', '.join(sorted(kinds))}; not supported")


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
        has_sink_logits=any(hasattr(m, "layer_idx") and hasattr(m, "sinks") for m in inside.modules()),
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
