"""The parts of a model that the compiled decode step computes, recognised by the names of its modules.

Norms, activations and routers are compared with what their modules return, so that their class does not matter. A part that is
not recognised raises `HeadsinkError` with its name. `generation/step_check.py` compares the whole step with the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from headsink.attention.rotary import layer_rotations
from headsink.errors import HeadsinkError
from headsink.generation.step_kernel import Activation, NormKind, Scores
from headsink.models.families import LATE_NORMS
from headsink.models.rope import Rotary
from headsink.models.spec import Architecture, attention_modules, decoder, describe, output_projection

ACTIVATIONS = {
    Activation.SILU: F.silu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.GELU: F.gelu,
    Activation.RELU: F.relu,
    Activation.RELU_SQUARED: lambda x: F.relu(x).square(),
    Activation.SIGMOID: torch.sigmoid,
}
# Names of parts, in the order of preference.
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
BEFORE_ATTENTION = ("input_layernorm", "attention_layernorm")
BEFORE_MLP = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "feedforward_layernorm")
AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
MLPS = ("mlp", "block_sparse_moe", "feed_forward")
GATES, UPS = ("gate_proj",), ("up_proj", "c_fc", "fc1", "dense_h_to_4h")
DOWNS = ("down_proj", "output_linear", "c_proj", "fc2", "dense_4h_to_h")
ACTS = ("act_fn", "activation_fn", "activation", "act")
ROUTERS, SHARED = ("gate", "router"), ("shared_experts", "shared_expert", "shared_mlp")
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")
EPS = ("variance_epsilon", "eps", "norm_eps")
BIASES = ("e_score_correction_bias", "expert_bias")
GAPS = 0.02  # relative difference of outputs that are the same up to rounding in bfloat16


@dataclass(frozen=True)
class Norm:
    """weight, bias: float32 [columns], or [period, columns] of groups of columns; None for none."""

    kind: NormKind
    weight: Tensor | None
    bias: Tensor | None
    eps: float


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
    activation: Activation
    inner: Norm | None = None
    share: Linear | None = None


@dataclass(frozen=True)
class Experts:
    """gate_up: [experts, 2 x inner, hidden]; down: [experts, hidden, inner]. bias: float32 [experts], for the choice only.
    normalised: shares are divided by their sum; then they are multiplied by `scale`."""

    router: Linear
    gate_up: Tensor
    down: Tensor
    activation: Activation
    top_k: int
    scores: Scores
    normalised: bool
    scale: float
    bias: Tensor | None


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
    """The children, parameters and buffers of a module that are not recognised yet."""

    module: nn.Module
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found |= dict(self.module.named_children())
        self.found |= dict(self.module.named_buffers(recurse=False)) | dict(self.module.named_parameters(recurse=False))

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
    rest, head = _Rest(stack), model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    blocks = next((c for c in stack.children() if isinstance(c, nn.ModuleList) and len(c) == shape.layers), None)
    if blocks is None or head is None or embedding is None:
        raise HeadsinkError("its layers or embeddings have no usual place")
    norm = _norm(rest.need(*FINAL_NORMS), config.hidden_size)
    rest.take("rotary_emb")
    rest.found = {name: part for name, part in rest.found.items() if part is not blocks and part is not embedding}
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
    rest = _Rest(block)
    rest.found = {name: part for name, part in rest.found.items() if part is not module}
    size, parallel = config.hidden_size, bool(getattr(config, "use_parallel_residual", False))

    def norm(*names: str) -> Norm | None:
        part = rest.take(*names)
        return None if part is None else _norm(part, size)

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
    rest, output = _Rest(module), output_projection(module)
    rest.found = {name: part for name, part in rest.found.items() if part is not output}
    query, key, value = _projections(rest, heads)
    if [sum(len(own.weight) for own in part) // dim for part in (query, key, value)] != [query_heads, *[kv_heads] * 2]:
        raise HeadsinkError("its queries, keys and values have other sizes than its heads")

    def norm(count: int, *names: str) -> Norm | None:
        part = rest.take(*names)
        return None if part is None else _norm(part, dim, count)

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
    if (fused := rest.take("qkv_proj", "Wqkv")) is not None:
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
        _activation(rest.need(*ACTS)),
        None if norm is None else _norm(norm, len(up.weight)),
        None if share is None else _linear(share),
    )
    rest.end()
    return found


def _experts(module: Any, router: Any, bias: Tensor | None) -> Experts:
    rest, own = _Rest(module), _Rest(router)
    gate_up, down = rest.need("gate_up_proj"), rest.need("down_proj")
    activation = _activation(rest.need(*ACTS))
    rest.end()
    inside = own.take("moe_statics")
    given = own.take(*BIASES) if inside is None else inside.e_score_correction_bias
    if bias is None and given is not None:
        bias = given.flatten()
    linear = own.take("gate", "wg")
    weight = linear.weight if linear is not None else own.need("weight")
    own.end()
    count, inner, hidden = len(gate_up), gate_up.shape[1] // 2, weight.shape[1]
    if gate_up.shape != (count, 2 * inner, hidden) or down.shape != (count, hidden, inner):
        raise HeadsinkError("its experts' weights are not [experts, out, in]")
    if not gate_up.is_contiguous() or not down.is_contiguous() or weight.dtype != gate_up.dtype:
        raise HeadsinkError("its experts' weights are not contiguous, or its router has another dtype")
    return Experts(
        Linear(weight.detach()), gate_up.detach(), down.detach(), activation, *_routing(router, weight, bias)
    )


@torch.no_grad()
def _routing(router: Any, weight: Tensor, bias: Tensor | None) -> tuple[int, Scores, bool, float, Tensor | None]:
    """How a router chooses: top-k, scores, whether shares are normalised, their scale, and the bias of the choice."""
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    arguments = (x[None],) if hasattr(router, "gate") else (x,)
    try:
        _, shares, chosen = router(*arguments, *(() if bias is None or hasattr(router, "moe_statics") else (bias,)))
    except TypeError:
        _, shares, chosen = router(*arguments)
    logits, extra = F.linear(x.float(), weight.float()), None if bias is None else bias.detach().float().contiguous()
    for kind, scores in ((Scores.SOFTMAX, logits.softmax(-1)), (Scores.SIGMOID, logits.sigmoid())):
        best = (scores if extra is None else scores + extra).topk(chosen.shape[-1], -1).indices
        if (best.sort(-1).values == chosen.sort(-1).values).float().mean() < 0.9:  # ties in bfloat16
            continue
        own = scores.gather(-1, chosen)
        for normalised in (False, True):
            expected = own / own.sum(-1, keepdim=True) if normalised else own
            ratio = shares.float() / expected
            scale = float(ratio.median())
            if float((ratio / scale - 1).abs().median()) < GAPS:
                exact = round(scale, 3)
                return (
                    chosen.shape[-1],
                    kind,
                    normalised,
                    exact if abs(exact / scale - 1) < GAPS / 2 else scale,
                    extra,
                )
    raise HeadsinkError(f"its router {type(router).__name__} chooses experts in another way")


def _linear(module: Any) -> Linear:
    weight = getattr(module, "weight", None)
    if hasattr(module, "base_layer"):
        raise HeadsinkError("its layers have a PEFT adapter: call model.merge_and_unload()")
    if weight is None or type(module) is not nn.Linear or type(weight.data) is not Tensor or not weight.is_contiguous():
        raise HeadsinkError(f"it has a {type(module).__name__} that is no plain matrix")
    return Linear(weight.detach(), None if module.bias is None else module.bias.detach().float().contiguous())


def _activation(function: Any) -> Activation:
    x = torch.linspace(-4, 4, 33)
    with torch.no_grad():
        found = function(x)
    for kind, candidate in ACTIVATIONS.items():
        if torch.allclose(found, candidate(x), atol=1e-5):
            return kind
    raise HeadsinkError(f"its activation is {type(function).__name__}")


def _norm(module: Any, size: int, count: int = 1) -> Norm:
    """A norm over `size` columns, of `count` groups. One over all groups together is recognised by its weight."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None and weight.dim() == 1 and len(weight) == size * count:
        size = len(weight)
    shape = (size,) if weight is None else tuple(weight.shape)
    if shape[-1] != size or len(shape) > 2 or (len(shape) == 2 and shape[0] != count):
        raise HeadsinkError(f"its {type(module).__name__} has a weight of shape {list(shape)}")
    kind = torch.float32 if weight is None else weight.dtype
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    given = [epsilon for name in EPS if isinstance(epsilon := getattr(module, name, None), float)]
    gains = [None] if weight is None else [weight.detach().float(), weight.detach().float() + 1]
    added = None if bias is None else bias.detach().float()
    forms = product(NormKind, gains, given[:1] or (1e-5, 1e-6, 1e-12))
    candidates = [Norm(form, gain, added, eps) for form, gain, eps in forms]
    errors = [_error(module, norm, [(probe * scale).to(kind) for scale in (1, 0.003)]) for norm in candidates]
    if min(errors) > GAPS:
        raise HeadsinkError(f"its {type(module).__name__} is neither RMS norm nor layer norm")
    return candidates[errors.index(min(errors))]


@torch.no_grad()
def _error(module: Any, norm: Norm, inputs: list[Tensor]) -> float:
    """The largest relative difference of a module and a norm on some inputs."""
    return max(_difference(module(x[None, None])[0, 0].float(), norm, x.float()) for x in inputs)


def _difference(found: Tensor, norm: Norm, own: Tensor) -> float:
    own = own - own.mean(-1, keepdim=True) if norm.kind == NormKind.LAYER else own
    expected = own * (own.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    expected = expected if norm.weight is None else expected * norm.weight
    expected = expected if norm.bias is None else expected + norm.bias
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def tensors(parts: Sequence[Any]) -> list[Tensor]:
    """Every tensor inside dataclasses and lists, to keep the memory that a kernel accesses by address."""
    found = list[Tensor]()
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, list | tuple):
            found += tensors(part)
        elif hasattr(part, "__dataclass_fields__"):
            found += tensors(list(vars(part).values()))
    return found
