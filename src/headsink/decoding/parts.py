"""The parts of a model that the compiled decode step computes, recognised by the names of its modules.

A part that is not recognised raises `HeadsinkError` with its name. decoding/forms.py finds out what norms, activations and
routers compute, and decoding/cpu.py compares the whole step with the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from headsink.attention.rotary import layer_rotations
from headsink.decoding.fields import Activation, Scores
from headsink.decoding.forms import Norm, Xielu, activation_of, norm_of, routing_of
from headsink.errors import HeadsinkError
from headsink.models.families import LATE_NORMS
from headsink.models.rope import Rotary
from headsink.models.spec import Architecture, attention_modules, decoder, describe, output_projection

# Names of parts, in the order of preference.
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
BEFORE_ATTENTION = ("input_layernorm", "attention_layernorm")
BEFORE_MLP = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "feedforward_layernorm")
AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
MLPS = ("mlp", "block_sparse_moe")
GATES, UPS = ("gate_proj",), ("up_proj", "c_fc", "fc1", "dense_h_to_4h")
DOWNS = ("down_proj", "output_linear", "c_proj", "fc2", "dense_4h_to_h")
ACTS = ("act_fn", "activation_fn", "activation", "act")
ROUTERS, SHARED = ("gate", "router"), ("shared_experts", "shared_expert", "shared_mlp")
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")
BIASES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class Linear:
    """weight: [out, in], contiguous rows in the model's memory. bias: float32 [out], or None."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, start: int, end: int) -> Linear:
        return Linear(self.weight[start:end], None if self.bias is None else self.bias[start:end])


@dataclass(frozen=True)
class MLP:
    """down(activation(gate x) * up x), or down(activation(up x)). inner: norm before `down`. share: gate of the whole output."""

    gate: Linear | None
    up: Linear
    down: Linear
    activation: Activation | Xielu
    inner: Norm | None = None
    share: Linear | None = None


@dataclass(frozen=True)
class Experts:
    """gate_up: [experts, 2 x inner, hidden]; down: [experts, hidden, inner]. bias: float32 [experts], for the choice only.
    normalised: shares are divided by their sum; then they are multiplied by `scale`. transposed: of gpt-oss, else None."""

    router: Linear
    gate_up: Tensor
    down: Tensor
    activation: Activation | None
    transposed: Transposed | None
    top_k: int
    scores: Scores
    normalised: bool
    scale: float
    bias: Tensor | None


@dataclass(frozen=True)
class Transposed:
    """Experts whose weights are [experts, hidden, 2 x inner] and [experts, inner, hidden], with gates and ups in turn.

    Inner activations: (clamp(up, -limit, limit) + 1) x gate x sigmoid(alpha x gate), where gate is at most limit. gate_up_bias,
    down_bias: float32 [experts, columns].
    """

    gate_up_bias: Tensor
    down_bias: Tensor
    alpha: float
    limit: float


@dataclass(frozen=True)
class Attention:
    """query, key, value: matrices whose outputs follow each other. gate: of the output, by a sigmoid. rotated, interleaved:
    queries and keys by their position (models/rope.py). late: their norms come after that. sinks: float32 [query heads], logits
    without values."""

    query: list[Linear]
    key: list[Linear]
    value: list[Linear]
    output: Linear
    scaling: float
    softcap: float
    rotated: bool
    interleaved: bool
    late: bool
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    value_norm: Norm | None = None
    inner: Norm | None = None
    gate: Linear | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """A decoder layer. parallel: the MLP reads the layer's input too. multiplier: of both outputs. scalar: of the layer."""

    attention: Attention
    mlps: list[MLP | Experts]
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    parallel: bool
    multiplier: float
    scalar: float


@dataclass(frozen=True)
class Parts:
    """A model. embedding: module; scale: of embeddings. logit_scale, logit_cap: of the logits; cap 0 for none."""

    shape: Architecture
    embedding: nn.Module
    scale: float
    blocks: list[Block]
    norm: Norm
    head: Linear
    logit_scale: float
    logit_cap: float


@dataclass
class _Rest:
    """The children, parameters and buffers of a module that are not recognised yet. known: parts that are."""

    module: nn.Module
    known: Sequence[nn.Module] = ()

    def __post_init__(self) -> None:
        parts: dict[str, Any] = dict(self.module.named_children())
        parts |= dict(self.module.named_buffers(recurse=False)) | dict(self.module.named_parameters(recurse=False))
        self.found = {name: part for name, part in parts.items() if not any(part is own for own in self.known)}

    def take(self, *names: str) -> Any:
        """Return the first part with one of these names, None if there is none."""
        name = next((name for name in names if self.found.get(name) is not None), None)
        return None if name is None else self.found.pop(name)

    def need(self, *names: str) -> Any:
        part = self.take(*names)
        if part is None:
            raise HeadsinkError(f"its {type(self.module).__name__} has no part named {' or '.join(names)}")
        return part

    def end(self) -> None:
        """Raise if a part with weights is left."""
        for name, part in self.found.items():
            if isinstance(part, Tensor) or list(part.parameters()) or list(part.buffers()):
                raise HeadsinkError(f"its {type(self.module).__name__} has a part that is not supported: {name}")


def parts_of(model: PreTrainedModel) -> Parts:
    """Return the parts of a model. Raises HeadsinkError with the reason for a model that is not supported."""
    shape, stack, config = describe(model), decoder(model), model.config.get_text_config(decoder=True)
    if (getattr(config, "rope_parameters", None) or {}).get("mrope_section"):
        raise HeadsinkError("its positions have several axes")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    blocks = next((c for c in stack.children() if isinstance(c, nn.ModuleList) and len(c) == shape.layers), None)
    if blocks is None or head is None or embedding is None:
        raise HeadsinkError("its layers or embeddings have no usual place")
    rest = _Rest(stack, [blocks, embedding])
    norm = norm_of(rest.need(*FINAL_NORMS), config.hidden_size)
    rest.take("rotary_emb")
    rest.end()
    rotations = layer_rotations(model)
    modules = attention_modules(model)
    scale = getattr(stack, "embedding_multiplier", 1.0)
    if getattr(config, "mup_enabled", False):
        scale = math.sqrt(config.hidden_size)
    return Parts(
        shape,
        embedding,
        float(scale),
        [_block(*own, shape, n, config) for n, own in enumerate(zip(blocks, modules, rotations, strict=True))],
        norm,
        _linear(head),
        float(getattr(model, "logit_scale", 1.0)) / float(getattr(config, "logits_scaling", 1.0)),
        float(getattr(config, "final_logit_softcapping", None) or 0),
    )


def _block(block: Any, module: Any, rotary: Rotary | None, shape: Architecture, layer: int, config: Any) -> Block:
    rest = _Rest(block, [module])
    size, parallel = config.hidden_size, bool(getattr(config, "use_parallel_residual", False))

    def norm(*names: str) -> Norm | None:
        part = rest.take(*names)
        return None if part is None else norm_of(part, size)

    before_attention, after_attention = norm(*BEFORE_ATTENTION), norm("post_self_attn_layernorm")
    before_mlp, after_mlp = norm(*BEFORE_MLP), norm(*AFTER_MLP)
    between = norm("post_attention_layernorm")  # before the MLP in some families, after attention in others
    if between is not None and before_mlp is None and before_attention is not None:
        before_mlp = between
    elif between is not None:
        after_attention = between
    scalar = rest.take("layer_scalar")
    mlps = [mlp for name in (*MLPS, *SHARED) if (own := rest.take(name)) is not None for mlp in _mlps(own)]
    rest.end()
    if not mlps:
        raise HeadsinkError(f"its {type(block).__name__} has no MLP under one of the names {', '.join(MLPS)}")
    return Block(
        _attention(module, rotary, shape.heads[layer], config),
        mlps,
        before_attention,
        after_attention,
        before_mlp,
        after_mlp,
        parallel or (before_mlp is None and after_mlp is None),
        float(getattr(block, "residual_multiplier", 1.0)),
        1.0 if scalar is None else float(scalar),
    )


def _attention(module: Any, rotary: Rotary | None, heads: tuple[int, int, int], config: Any) -> Attention:
    query_heads, kv_heads, dim = heads
    output = output_projection(module)
    rest = _Rest(module, [output])
    query, key, value = _projections(rest, heads)
    if [sum(len(own.weight) for own in part) // dim for part in (query, key, value)] != [query_heads, *[kv_heads] * 2]:
        raise HeadsinkError("its queries, keys and values have other sizes than its heads")

    def norm(count: int, *names: str) -> Norm | None:
        part = rest.take(*names)
        return None if part is None else norm_of(part, dim, count)

    sinks = rest.take("sinks")
    gate = rest.take("gate_proj")
    found = Attention(
        query,
        key,
        value,
        _linear(output),
        float(module.scaling if hasattr(module, "scaling") else dim**-0.5),
        float(getattr(module, "attn_logit_softcapping", None) or 0),
        rotary is None or bool(rotary.inverse.any()),
        rotary is not None and rotary.interleaved,
        config.model_type in LATE_NORMS,
        norm(query_heads, *QUERY_NORMS),
        norm(kv_heads, *KEY_NORMS),
        norm(kv_heads, "v_norm"),
        norm(query_heads, "attn_sub_norm"),
        None if gate is None else _linear(gate),
        None if sinks is None else sinks.detach().float().contiguous(),
    )
    rest.end()
    return found


def _projections(rest: _Rest, heads: tuple[int, int, int]) -> list[list[Linear]]:
    """The matrices of queries, keys and values."""
    query_heads, kv_heads, dim = heads
    if (fused := rest.take("qkv_proj")) is not None:
        whole, ends = _linear(fused), [0, query_heads, query_heads + kv_heads, query_heads + 2 * kv_heads]
        return [[whole.rows(start * dim, end * dim)] for start, end in pairwise(ends)]
    if (fused := rest.take("query_key_value")) is not None:  # head by head
        whole = _linear(fused)
        spans = [[(3 * head + n) * dim for head in range(query_heads)] for n in range(3)]
        return [[whole.rows(start, start + dim) for start in own] for own in spans]
    query, key, own = rest.need("q_proj"), rest.need("k_proj"), rest.take("v_proj")
    if own is None and not getattr(rest.module, "use_alternative_attention", False):
        raise HeadsinkError(f"its {type(rest.module).__name__} has no part named v_proj")
    return [[_linear(part)] for part in (query, key, key if own is None else own)]  # Gemma 4: values are the keys


def _mlps(module: nn.Module) -> list[MLP | Experts]:
    """The MLPs whose outputs are added, in a module of a layer."""
    rest = _Rest(module)
    experts = rest.take("experts")
    if experts is None:
        return [_mlp(rest)]
    router, found = rest.need(*ROUTERS), list[MLP | Experts]()
    bias = rest.take(*BIASES)
    found.append(_experts(experts, router, bias))
    shared, share = rest.take(*SHARED), rest.take("shared_expert_gate")
    if shared is not None:
        found.append(_mlp(_Rest(shared), share))
    rest.end()
    return found


def _mlp(rest: _Rest, share: nn.Module | None = None) -> MLP:
    fused, own = rest.take("gate_up_proj", "input_linear"), rest.take(*GATES)
    gate = None if own is None else _linear(own)
    if fused is None:
        up = _linear(rest.need(*UPS))
    else:
        whole = _linear(fused)
        inner = len(whole.weight) // 2
        gate, up = whole.rows(0, inner), whole.rows(inner, 2 * inner)
    norm = rest.take("ffn_sub_norm")
    found = MLP(
        gate,
        up,
        _linear(rest.need(*DOWNS)),
        activation_of(rest.need(*ACTS)) if gate is None else _activation(rest),
        None if norm is None else norm_of(norm, len(up.weight)),
        None if share is None else _linear(share),
    )
    rest.end()
    return found


def _activation(rest: _Rest) -> Activation:
    """The activation of a gate."""
    found = activation_of(rest.need(*ACTS))
    if isinstance(found, Xielu):
        raise HeadsinkError("its gates have xIELU activations")
    return found


def _experts(module: Any, router: Any, bias: Tensor | None) -> Experts:
    rest, own = _Rest(module), _Rest(router)
    gate_up, down = rest.need("gate_up_proj"), rest.need("down_proj")
    transposed, activation = None, None
    if "gate_up_proj_bias" in rest.found and hasattr(module, "alpha") and hasattr(module, "limit"):
        first, second = (
            rest.need(name).detach().float().contiguous() for name in ("gate_up_proj_bias", "down_proj_bias")
        )
        transposed = Transposed(first, second, float(module.alpha), float(module.limit))
    else:
        activation = _activation(rest)
    rest.end()
    inside = own.take("moe_statics")
    given = own.take(*BIASES) if inside is None else inside.e_score_correction_bias
    if bias is None and given is not None:
        bias = given.flatten()
    linear = own.take("gate", "wg")
    weight = linear.weight if linear is not None else own.need("weight")
    added = own.take("bias")
    own.end()
    count, hidden = len(gate_up), weight.shape[1]
    into, back = (gate_up.mT, down.mT) if transposed else (gate_up, down)
    inner = into.shape[1] // 2
    if into.shape != (count, 2 * inner, hidden) or back.shape != (count, hidden, inner):
        raise HeadsinkError("its experts' weights have an unusual shape")
    if not gate_up.is_contiguous() or not down.is_contiguous() or weight.dtype != gate_up.dtype:
        raise HeadsinkError("its experts' weights are not contiguous, or its router has another dtype")
    matrix = Linear(weight.detach(), None if added is None else added.detach().float().contiguous())
    return Experts(matrix, gate_up.detach(), down.detach(), activation, transposed, *routing_of(router, weight, bias))


def _linear(module: Any) -> Linear:
    weight = getattr(module, "weight", None)
    if weight is None or type(module) is not nn.Linear or type(weight.data) is not Tensor or not weight.is_contiguous():
        raise HeadsinkError(f"it has a {type(module).__name__} that is no plain matrix")
    return Linear(weight.detach(), None if module.bias is None else module.bias.detach().float().contiguous())
