"""A decode step of our own on a CPU: the model's weights, its cache, one compiled call a token (kernels.py).

Activations stay in float32, so in bfloat16 the logits are nearer to those of the exact model than the model's own are.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headsink.attention.cpu.backend import CPUBackend
from headsink.attention.cpu.threads import claim, turn
from headsink.attention.kv_table import KVField, advance
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import KeyVisibility
from headsink.cache.cache import PlanCache
from headsink.cache.kv_table import KVTable
from headsink.cache.layer import PlanLayer
from headsink.errors import HeadsinkError, must_be
from headsink.generation.step_checks import Held
from headsink.models.devices import dtype_name
from headsink.models.families import COMPILED_DECODE
from headsink.models.spec import attention_modules, decoder, describe

AHEAD = 64  # tokens that buffers and positions are made ready for at once


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model cannot decode here; None if it can."""
    config, shape = model.config.get_text_config(decoder=True), describe(model)
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'headsink[cpu]'"
    if config.model_type not in COMPILED_DECODE:
        return f"{config.model_type} is not one of {', '.join(COMPILED_DECODE)}"
    if any(shape.windows):
        return "layers of this model slide by themselves"
    if not shape.prefix_free:
        return "its rotary positions depend on the length of the text"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if model.training:
        return "it is in training mode: call model.eval()"
    if any(m._forward_hooks or m._forward_pre_hooks for layer in decoder(model).layers for m in layer.modules()):  # type: ignore[union-attr]
        return "its layers have hooks, which the step would pass by"
    weights = [*model.parameters(), *model.buffers()]
    if any(weight.device.type != "cpu" for weight in weights):
        return "it is not on the CPU"
    odd = [reason for linear, may_add in _linears(model) if (reason := _odd(linear, may_add)) is not None]
    if odd:
        return odd[0]
    kinds = {weight.dtype for weight in model.parameters()}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.bfloat16}:
        return f"its weights are {', '.join(sorted(map(dtype_name, kinds)))}, not float32 or bfloat16"
    return None


def prepare(model: PreTrainedModel) -> None:
    """Compile what a model that can decode here runs: half a minute the first time on a machine, then from numba's cache."""
    claim()
    from headsink.attention.cpu import decode

    key = torch.zeros(1, 1, 1, 16, dtype=model.dtype)
    kernels, params = CPUBackend(), AttentionParams(1.0)
    kernels.decode(key, key, key, key[..., 0] == 0, 1, params)
    kernels.prefill(key, key[0], key[0], KeyVisibility(torch.ones(1, 1), 0, 0, 0, None, False, 0, 0), params)

    def empty(*shape: int) -> Any:
        return np.zeros(shape, np.float32)

    row = np.zeros((1, 1), _kind(model.dtype))  # a model without layers, of one number
    tables = np.zeros((0, len(decode.Weight)), np.int64), np.zeros((0, 1, 1, len(KVField)), np.int64)
    arrays = empty(0, 2, 1), empty(0, 0, 2), empty(0, 0), empty(1)
    one = np.float32(1)
    decode.run(
        *tables,
        *arrays,
        row.ctypes.data,
        empty(1, 1),
        empty(1, 2),
        empty(1, 2),
        empty(2, 0, 1, 0, 0),
        empty(1, 1),
        row[0, :0],
        1,
        1,
        one,
        one,
        1,
    )


def _kind(dtype: torch.dtype) -> Any:
    """What numba takes a dtype for."""
    return np.uint16 if dtype == torch.bfloat16 else np.float32


class Decoder:
    """A model and a cache, laid out for the kernel. Addresses are read once: neither may change in between. What lies there is
    held on to, so that a change gives an error or old weights, and never reads what is not there."""

    def __init__(self, model: PreTrainedModel, cache: PlanCache):
        claim()
        from headsink.attention.cpu import decode  # numba takes a second, which other commands need not wait for

        self.kernels, self.cache = decode, cache
        self.stack = cast(Any, decoder(model))
        self.shape = shape = describe(model)
        self.layers = [layer for layer in cache.layers if isinstance(layer, PlanLayer)]
        attention: list[Any] = attention_modules(model)  # type: ignore[assignment]
        blocks = list(self.stack.layers)
        self.parameters = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.embedding, self.unembedding = (weight.detach() for weight in self.parameters)
        self.held = Held(shape, self.layers, self.embedding.dtype)
        self.like = np.empty(0, _kind(self.embedding.dtype))
        self._weights = [
            [a.q_proj, a.k_proj, a.v_proj, a.o_proj, b.mlp.gate_proj, b.mlp.up_proj, b.mlp.down_proj]
            for a, b in zip(attention, blocks, strict=True)
        ]
        self.matrices = [[linear.weight.detach() for linear in row] for row in self._weights]
        self.weights = np.array([[matrix.data_ptr() for matrix in row] for row in self.matrices])
        self.norms = _table([[b.input_layernorm.weight, b.post_attention_layernorm.weight] for b in blocks])
        self.last_norm = _array(self.stack.norm.weight)
        self.eps = np.float32(self.stack.norm.variance_epsilon)
        has_norms, has_biases = hasattr(attention[0], "q_norm"), attention[0].q_proj.bias is not None
        self.head_norms = np.zeros((shape.layers, 0, shape.head_dim), np.float32)
        self.biases = np.zeros((shape.layers, 0), np.float32)
        if has_norms:
            self.head_norms = _table([[a.q_norm.weight, a.k_norm.weight] for a in attention])
        if has_biases:
            self.biases = np.stack([np.concatenate([_array(p.bias) for p in row[:3]]) for row in self._weights])
        self.inner = self._weights[0][4].out_features
        self.scaling = np.float32(attention[0].scaling)
        self.vocabulary = len(self.unembedding)
        self.length = cache.get_seq_length()
        self.begun = self.ready = self.length  # columns that there is room for
        self.turns: Any = (
            None  # of places in the cache, float32 [2, places, rotated], where positions are counted in it
        )

    def resume(self) -> None:
        """Go on after the cache was changed by others."""
        self.held = Held(self.shape, self.layers, self.embedding.dtype)
        self.length = self.ready = self.held.length

    def run(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Let a token of every text in, int64 [texts]. places: their positions, if they are not those of the columns.

        Returns the logits of what follows, float32 [texts, vocabulary].
        """
        self.held.check(tuple(tokens.shape))
        same = (self.parameters[0].data_ptr(), self.parameters[1].data_ptr())
        if same != (self.embedding.data_ptr(), self.unembedding.data_ptr()):
            raise HeadsinkError("decode: the model was changed since the step was made: make a new one")
        if places is not None:
            must_be("decode: positions", places.shape, tokens.shape)
        if self.length >= self.ready:
            self._make_ready()
        self.cache.plan.check_length(self.length + 1, self.shape.max_context)
        if self.length == self.cache.plan.verified:  # of a prompt beyond it the model's pass has warned
            self.cache.plan.warn_beyond_verified(self.length + 1)
        length = self.length
        advance(self.heads, length)
        texts = len(self.pads)
        logits = torch.empty(texts, self.vocabulary)
        cos, sin = (turning[:, length - self.begun] for turning in (self.cos, self.sin))
        if places is not None:
            cos, sin = (turning[:, 0] for turning in self._rotation(places[:, None]))
        if (
            self.turns is not None
        ):  # first tokens are looked at from the last place of the cache, once the text is beyond it
            turns = np.take(self.turns, np.clip(length - self.pads, 0, self.last_place[:, None]), 1)
        else:
            turns = np.zeros((2, len(self.layers), texts, 0, 0), np.float32)
        with turn() as threads:
            self.kernels.run(
                self.weights,
                self.heads,
                self.norms,
                self.head_norms,
                self.biases,
                self.last_norm,
                self.unembedding.data_ptr(),
                self.embedding[tokens].to(torch.float32, copy=True).numpy(),
                np.ascontiguousarray(cos),
                np.ascontiguousarray(sin),
                turns,
                logits.numpy(),
                self.like,
                self.inner,
                self.shape.group,
                self.scaling,
                self.eps,
                threads,
            )
        self.length += 1
        return logits

    def start_evicting(self) -> None:
        """Tell the cache what has come in."""
        for layer in self.layers:
            layer.seen = self.length
            for group in layer.groups:
                group.length = self.length
        self.held.length = self.length

    def _make_ready(self) -> None:
        """Room in the buffers and rotary positions for the next tokens, and the table of what lies where."""
        self.start_evicting()
        for layer in self.layers:
            layer.layout = None  # buffers may move now, and it has their addresses
        layouts = [KVTable(layer.groups, AHEAD) for layer in self.layers]
        self.held = Held(self.shape, self.layers, self.embedding.dtype)  # buffers may have grown
        self.begun, self.ready = self.length, min(self.length + AHEAD, *(layout.until for layout in layouts))
        self.heads = np.stack([layout.table for layout in layouts])
        self.pads = self.heads[0, :, :1, KVField.PAD]
        columns = torch.arange(self.length, self.length + AHEAD)
        self.cos, self.sin = self._rotation((columns - torch.from_numpy(self.pads)).clamp(min=0))
        if self.cache.plan.positions == "cache-relative":
            self.last_place = np.array(
                [[max(head.sink + (head.window or 0) - 1, 0) for head in row or ()] for row in self.cache.plan.layers]
            )
            places = min(int(self.last_place.max()), self.length + AHEAD) + 1  # a plan's window may have any size
            if self.turns is None or self.turns.shape[1] < places:
                self.turns = np.stack([found[0] for found in self._rotation(torch.arange(places)[None])])

    def _rotation(self, positions: Tensor) -> tuple[Any, Any]:
        """cos and sin of rotary positions, int64 [texts, tokens]: float32 [texts, tokens, rotated]."""
        cos, sin = self.stack.rotary_emb(torch.empty(0), positions)
        return cos.float().numpy(), sin.float().numpy()


def _linears(model: PreTrainedModel) -> Iterator[tuple[nn.Module, bool]]:
    """Every linear map that the kernel runs, and whether it may have a bias."""
    for module in attention_modules(model):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield getattr(module, name), name != "o_proj"
    for layer in decoder(model).layers:  # type: ignore[union-attr]
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield getattr(layer.mlp, name), False  # type: ignore[union-attr, arg-type]
    yield model.get_output_embeddings(), False  # type: ignore[misc]


def _odd(linear: nn.Module, may_add: bool) -> str | None:
    if hasattr(linear, "base_layer"):
        return "PEFT has put an adapter into its layers: call model.merge_and_unload()"
    if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor or not linear.weight.is_contiguous():
        return f"it has a {type(linear).__name__} that is no plain matrix"
    return "it adds where the kernel does not" if linear.bias is not None and not may_add else None


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().numpy()


def _table(rows: list[list[Tensor]]) -> Any:
    return np.stack([np.stack([_array(tensor) for tensor in row]) for row in rows])
