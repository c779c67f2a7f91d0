"""The architecture of a model as headsink needs it: its attention layers and the shape of their heads.

A supported model is a causal decoder with full attention in some layers, through transformers' `AttentionInterface`. A plan
governs these layers; others (sliding windows, linear attention, convolutions) run as they are. Models that are not supported
raise an error with the reason (docs/families.md). Wrappers of PEFT, torch.compile and DistributedDataParallel are unwrapped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from headsink.errors import HeadsinkError
from headsink.models.families import ENCODERS, OUTPUT_PROJECTIONS, OWN_CACHE

# The attribute of the wrapped model in torch.compile, DistributedDataParallel, PEFT models and PEFT tuners.
INSIDE = ("_orig_mod", "module", "base_model", "model")
NO_MAXIMUM = 2**31 - 1  # tokens; the context of a model whose configuration names none
# Kinds of layers, as transformers names them: with attention, and others that run under a plan.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
RECURRENT = {"linear_attention", "conv"}
OTHERS = RECURRENT | {"dummy"}
# Parts of parameter names that wrappers add: compiled and checkpointed layers, and layers with a PEFT adapter.
WITHIN = {"_orig_mod", "_checkpoint_wrapped_module", "base_layer", "original_module", "token_adapter"}


@dataclass(frozen=True)
class Architecture:
    """The heads of a model. Numbers of heads and their size are those of the layers with full attention.

    windows: the model's own sliding window per layer, None for others. softcap: attention logits are capped (Gemma 2). uncapped:
    the model caps logits, but its attention implementation, `sdpa`, does not. prefix_free: the encoding of positions does not
    depend on the length of the text, so a prefix of a long text gives the same states as the short text. latent: layers cache one
    vector per token for all heads, instead of keys and values (multi-head latent attention). value_dim: size of the values of a
    head, None if it is `head_dim`. kinds, cache_arguments: transformers' kind of every layer, and the arguments of its cache
    layer. heads: query heads, KV heads and head size of every layer. keys_of: the layer whose keys every layer attends to, itself
    in most families (not in Gemma 3n), None for layers without attention.
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
    prefix_free: bool = True
    latent: bool = False
    value_dim: int | None = None
    kinds: tuple[str, ...] = ()
    cache_arguments: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    heads: tuple[tuple[int, int, int], ...] = ()
    keys_of: tuple[int | None, ...] = ()

    @property
    def planned(self) -> tuple[bool, ...]:
        """Whether a plan governs the layer: those with full attention."""
        return tuple(kind == "full_attention" for kind in self.kinds)

    @property
    def shared(self) -> tuple[bool, ...]:
        """Whether other layers attend to the keys of the layer."""
        used = [source for layer, source in enumerate(self.keys_of) if source != layer]
        return tuple(layer in used for layer in range(self.layers))

    def source(self, layer: int) -> int:
        """The layer whose keys a layer with attention attends to."""
        found = self.keys_of[layer]
        if found is None:
            raise HeadsinkError(f"layer {layer} of {self.name} has no attention")
        return found

    @property
    def attending(self) -> tuple[int, ...]:
        """The numbers of the layers with attention."""
        return tuple(layer for layer, source in enumerate(self.keys_of) if source is not None)

    @property
    def uniform(self) -> bool:
        """Whether heads are the same in all layers with attention."""
        return len({self.heads[layer] for layer in self.attending}) == 1

    @property
    def other_kinds(self) -> str:
        """The kinds of the layers without full attention, empty if there are none."""
        return ", ".join(sorted(set(self.kinds) - {"full_attention"}))

    @property
    def recurrent(self) -> bool:
        """Whether layers carry a state. Some of these models give other outputs in chunks than in one call."""
        return not RECURRENT.isdisjoint(self.kinds)

    def refuse(self, what: str, *kinds: str) -> None:
        """Raise if a layer is of one of these kinds. what: the call that does not support them."""
        if found := set(self.kinds) & set(kinds):
            raise HeadsinkError(f"{what}: {self.name} has layers of kind {', '.join(sorted(found))}; not supported")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads


def check_class(model_class: type, name: str) -> None:
    """Raise if models of this class are not supported. Needs no weights."""
    if not model_class._can_set_attn_implementation():  # type: ignore[attr-defined]
        raise HeadsinkError(
            f"{name}: {model_class.__name__} does not compute attention through transformers' AttentionInterface; "
            "headsink cannot see its heads"
        )


def check_config(config: Any, name: str) -> None:
    """Raise unless the configuration describes a causal decoder with full and sliding-window attention only."""
    encoder = config.is_encoder_decoder
    config = config.get_text_config(decoder=True)
    if encoder or config.is_encoder_decoder or config.model_type in ENCODERS:
        what = "an encoder" if config.model_type in ENCODERS else "an encoder-decoder"
        raise HeadsinkError(f"{name}: {config.model_type} is {what}; headsink works on causal decoders only")
    if config.model_type in OWN_CACHE:
        raise HeadsinkError(f"{name}: {config.model_type} accepts no cache but its own class; not supported")
    found = get_layer_types_and_kwargs(config)[0]
    if len(found) < len(config.per_layer_config):  # before 5.24 transformers' cache left these layers out
        raise HeadsinkError(
            f"{name}: {config.model_type} has layers that attend to the keys of other layers; this needs transformers 5.24"
        )
    kinds = set(found)
    if unknown := kinds - ATTENTION - OTHERS:
        raise HeadsinkError(
            f"{name}: {config.model_type} has layers of kind {', '.join(sorted(unknown))}; not supported"
        )
    if not kinds & ATTENTION:
        raise HeadsinkError(f"{name}: {config.model_type} has no attention layers")


def wrappers(model: nn.Module) -> list[nn.Module]:
    """Return a model and the models that it wraps, outermost first. The last one is the transformers model."""
    found = [model]
    while not isinstance(found[-1], PreTrainedModel):
        children = dict(found[-1].named_children())
        inside = next((children[name] for name in INSIDE if name in children), None)
        if inside is None:
            raise HeadsinkError(f"{type(model).__name__} is not a transformers model")
        found.append(inside)
    return found


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside wrappers of PEFT, torch.compile and DistributedDataParallel."""
    inside: PreTrainedModel = wrappers(model)[-1]  # type: ignore[assignment]
    return inside


def _class_name(model: PreTrainedModel) -> str:
    """Return the name of the model's class in transformers, also for a subclass from elsewhere, such as FSDP's."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models."):
            return kind.__name__
    return type(model).__name__


def describe(model: nn.Module) -> Architecture:
    """Read the shape of the heads of a transformers causal language model."""
    inside = unwrap(model)
    config, name = inside.config, _class_name(inside)
    check_class(type(inside), name)
    check_config(config, name)
    config = config.get_text_config(decoder=True)
    kinds, arguments = get_layer_types_and_kwargs(config)
    heads = [heads_of(layer) for layer in config.per_layer_config]
    planned = {own for own, kind in zip(heads, kinds, strict=True) if kind == "full_attention"} or set(heads[:1])
    if len(planned) > 1:
        raise HeadsinkError(
            f"{name}: its layers with full attention have different numbers or sizes of heads; not supported"
        )
    ((query_heads, kv_heads, head_dim),) = planned
    softcap = bool(getattr(config, "attn_logit_softcapping", None))
    return Architecture(
        name=name,
        layers=len(kinds),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=tuple(
            a.get("sliding_window") if kind == "sliding_attention" else None
            for a, kind in zip(arguments, kinds, strict=True)
        ),
        max_context=getattr(config, "max_position_embeddings", None) or NO_MAXIMUM,
        softcap=softcap,
        uncapped=softcap and config._attn_implementation == "sdpa",
        prefix_free=not _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"},
        latent=bool(getattr(config, "kv_lora_rank", None)),
        value_dim=getattr(config, "v_head_dim", None),
        kinds=tuple(kinds),
        cache_arguments=tuple(arguments),
        heads=tuple(heads),
        keys_of=_keys_of(config, kinds),
    )


def heads_of(config: Any) -> tuple[int, int, int]:
    """Return query heads, KV heads and head size in the configuration of a layer."""
    query_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    return query_heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // query_heads


def _keys_of(config: Any, kinds: list[str]) -> tuple[int | None, ...]:
    """Return the layer whose keys every layer attends to (`Architecture.keys_of`)."""
    modes = getattr(config, "kv_sharing_modes", None) or [None] * len(kinds)
    stored = {config.layer_types[layer]: layer for layer, mode in enumerate(modes) if mode == "store"}
    return tuple(
        stored[config.layer_types[layer]] if mode == "reuse" else layer if kind in ATTENTION else None
        for layer, (mode, kind) in enumerate(zip(modes, kinds, strict=True))
    )


def _rope_types(parameters: Any) -> set[str]:
    """Return the rope types in a configuration, which has one for all layers or one per layer type."""
    if not isinstance(parameters, dict):
        return set()
    nested = set().union(*(_rope_types(value) for value in parameters.values()))
    return nested | ({parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set())


def check_plannable(shape: Architecture) -> None:
    """Raise if a plan cannot hold for the model."""
    if shape.latent:
        raise HeadsinkError(
            f"{shape.name} caches one vector per token for all heads (multi-head latent attention); a plan needs the keys and "
            "values of every KV head"
        )
    if shape.value_dim not in (None, shape.head_dim):
        raise HeadsinkError(
            f"{shape.name} has keys of size {shape.head_dim} and values of size {shape.value_dim}; a plan needs the same size"
        )
    if shape.uncapped:
        raise HeadsinkError(
            f"{shape.name} caps its attention logits, but not with sdpa: call model.set_attn_implementation('eager')"
        )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules of the layers that have attention, in order."""
    shape = describe(model)
    found: dict[Any, nn.Module] = {
        m.layer_idx: m for m in unwrap(model).modules() if hasattr(m, "layer_idx") and _projection_name(m) is not None
    }
    if not found.keys() >= set(shape.attending):
        names = ", ".join(OUTPUT_PROJECTIONS)
        raise HeadsinkError(
            f"{shape.name}: no output projection in every attention layer, under one of the names {names}"
        )
    return [found[index] for index in shape.attending]


def output_projection(module: nn.Module) -> nn.Module:
    """Return the output projection of an attention module."""
    name = _projection_name(module)
    if name is None:
        raise HeadsinkError(f"{type(module).__name__}: no output projection named {', '.join(OUTPUT_PROJECTIONS)}")
    return module.get_submodule(name)


def _projection_name(module: nn.Module) -> str | None:
    own = dict(module.named_children())
    return next((name for name in OUTPUT_PROJECTIONS if name in own), None)


def decoder(model: nn.Module) -> nn.Module:
    """Return the decoder inside a causal language model, which takes the cache and returns hidden states."""
    inside = unwrap(model)
    found: nn.Module = inside.get_decoder()
    return found if isinstance(found, PreTrainedModel) else inside.base_model  # ModernBERT calls its head a decoder


def vocabulary(model: nn.Module) -> int:
    """Return the size of the vocabulary."""
    return int(unwrap(model).config.get_text_config(decoder=True).vocab_size)
