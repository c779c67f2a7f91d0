"""Compiled decode step on a CPU: one numba call per token over the model's weights and its cache (attention/cpu/decode.py).

Activations stay in float32, so in bfloat16 the logits are closer to those of the exact model than the model's own are.
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
from headsink.attention.cpu.threads import claim, exclusive_threads
from headsink.attention.kv_table import KVField, advance
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import KeyVisibility
from headsink.cache.cache import PlanCache
from headsink.cache.kv_table import KVTable
from headsink.cache.layer import PlanLayer
from headsink.errors import HeadsinkError, must_be
from headsink.generation.step_checks import CacheCheck
from headsink.models.devices import dtype_name
from headsink.models.families import COMPILED_DECODE
from headsink.models.spec import attention_modules, decoder, describe

AHEAD = 64  # tokens that buffers and positions are made ready for at once


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model has no compiled decode step; None if it has one."""
    config, shape = model.config.get_text_config(decoder=True), describe(model)
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'headsink[cpu]'"
    if config.model_type not in COMPILED_DECODE:
        return f"{config.model_type} is not one of {', '.join(COMPILED_DECODE)}"
    if shape.other_kinds:
        return f"this model has layers of kind {shape.other_kinds}"
    if not shape.prefix_free:
        return "its rotary positions depend on the length of the sequence"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if model.training:
        return "it is in training mode: call model.eval()"
    if any(m._forward_hooks or m._forward_pre_hooks for layer in decoder(model).layers for m in layer.modules()):  # type: ignore[union-attr]
        return "its layers have hooks, which the step would not call"
    weights = [*model.parameters(), *model.buffers()]
    if any(weight.device.type != "cpu" for weight in weights):
        return "it is not on the CPU"
    reasons = [reason for linear, bias in _linears(model) if (reason := _linear_refusal(linear, bias)) is not None]
    if reasons:
        return reasons[0]
    kinds = {weight.dtype for weight in model.parameters()}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.bfloat16}:
        return f"its weights are {', '.join(sorted(map(dtype_name, kinds)))}, not float32 or bfloat16"
    return None


def prepare(model: PreTrainedModel) -> None:
    """Compile the kernels: half a minute the first time on a machine, then loaded from numba's cache."""
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
    """The NumPy dtype by which kernels read a tensor of this dtype."""
    return np.uint16 if dtype == torch.bfloat16 else np.float32


class Decoder:
    """The weights and the cache of a model in the form that the kernel reads.

    Memory addresses are read once, so neither may change between calls. The tensors are referenced: after a change there is an
    error or the old weights are used, but never an access to freed memory.
    """

    def __init__(self, model: PreTrainedModel, cache: PlanCache):
        claim()
        from headsink.attention.cpu import decode  # importing numba takes a second, so import it only here

        self.kernels, self.cache = decode, cache
        self.stack = cast(Any, decoder(model))
        self.shape = shape = describe(model)
        self.layers = [layer for layer in cache.layers if isinstance(layer, PlanLayer)]
        attention: list[Any] = attention_modules(model)  # type: ignore[assignment]
        blocks = list(self.stack.layers)
        self.parameters = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.embedding, self.unembedding = (weight.detach() for weight in self.parameters)
        self.cache_check = CacheCheck(shape, self.layers, self.embedding.dtype)
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
        self.begun = self.ready = self.length  # first and last column of the allocated room
        self.turns: Any = None  # cos and sin of cache-relative positions, float32 [2, positions, rotated]

    def resume(self) -> None:
        """Continue after other code has changed the cache."""
        self.cache_check = CacheCheck(self.shape, self.layers, self.embedding.dtype)
        self.length = self.ready = self.cache_check.length

    def run(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append one token per sequence, int64 [sequences]. positions: by default they follow the cached tokens.

        Returns the logits of the next tokens, float32 [sequences, vocabulary].
        """
        self.cache_check.check(tuple(tokens.shape))
        same = (self.parameters[0].data_ptr(), self.parameters[1].data_ptr())
        if same != (self.embedding.data_ptr(), self.unembedding.data_ptr()):
            raise HeadsinkError("decode: the model was changed since the step was made: make a new one")
        if positions is not None:
            must_be("decode: positions", positions.shape, tokens.shape)
        if self.length >= self.ready:
            self._make_ready()
        self.cache.plan.check_length(self.length + 1, self.shape.max_context)
        if self.length == self.cache.plan.verified:  # for longer prompts the prefill has warned already
            self.cache.plan.warn_beyond_verified(self.length + 1)
        length = self.length
        advance(self.heads, length)
        sequences = len(self.pads)
        logits = torch.empty(sequences, self.vocabulary)
        cos, sin = (rotation[:, length - self.begun] for rotation in (self.cos, self.sin))
        if positions is not None:
            cos, sin = (rotation[:, 0] for rotation in self._rotation(positions[:, None]))
        # Queries see sink tokens from a position in the cache, at most from its last one.
        if self.turns is not None:
            turns = np.take(self.turns, np.clip(length - self.pads, 0, self.last_place[:, None]), 1)
        else:
            turns = np.zeros((2, len(self.layers), sequences, 0, 0), np.float32)
        with exclusive_threads() as threads:
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
        """Update the cache's lengths with the tokens that were appended."""
        for layer in self.layers:
            layer.seen = self.length
            for group in layer.groups:
                group.length = self.length
        self.cache_check.length = self.length

    def _make_ready(self) -> None:
        """Allocate room in the buffers and rotary positions for the next tokens, and rebuild the KV table."""
        self.start_evicting()
        for layer in self.layers:
            layer.layout = None  # it has the addresses of buffers that may move now
        layouts = [KVTable(layer.groups, AHEAD) for layer in self.layers]
        # buffers may have been reallocated
        self.cache_check = CacheCheck(self.shape, self.layers, self.embedding.dtype)
        self.begun, self.ready = self.length, min(self.length + AHEAD, *(layout.until for layout in layouts))
        self.heads = np.stack([layout.table for layout in layouts])
        self.pads = self.heads[0, :, :1, KVField.PAD]
        columns = torch.arange(self.length, self.length + AHEAD)
        self.cos, self.sin = self._rotation((columns - torch.from_numpy(self.pads)).clamp(min=0))
        if self.cache.plan.positions == "cache-relative":
            self.last_place = np.array(
                [[max(head.sink + (head.window or 0) - 1, 0) for head in row or ()] for row in self.cache.plan.layers]
            )
            count = min(int(self.last_place.max()), self.length + AHEAD) + 1  # a plan's window may have any size
            if self.turns is None or self.turns.shape[1] < count:
                self.turns = np.stack([rotation[0] for rotation in self._rotation(torch.arange(count)[None])])

    def _rotation(self, positions: Tensor) -> tuple[Any, Any]:
        """cos and sin of rotary positions, int64 [sequences, tokens]: float32 [sequences, tokens, rotated]."""
        cos, sin = self.stack.rotary_emb(torch.empty(0), positions)
        return cos.float().numpy(), sin.float().numpy()


def _linears(model: PreTrainedModel) -> Iterator[tuple[nn.Module, bool]]:
    """Every linear layer that the kernel computes, and whether it may have a bias."""
    for module in attention_modules(model):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield getattr(module, name), name != "o_proj"
    for layer in decoder(model).layers:  # type: ignore[union-attr]
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield getattr(layer.mlp, name), False  # type: ignore[union-attr, arg-type]
    yield model.get_output_embeddings(), False  # type: ignore[misc]


def _linear_refusal(linear: nn.Module, bias: bool) -> str | None:
    if hasattr(linear, "base_layer"):
        return "its layers have a PEFT adapter: call model.merge_and_unload()"
    if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor or not linear.weight.is_contiguous():
        return f"it has a {type(linear).__name__} that is no plain matrix"
    return "it has a bias that the kernel does not support" if linear.bias is not None and not bias else None


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().numpy()


def _table(rows: list[list[Tensor]]) -> Any:
    return np.stack([np.stack([_array(tensor) for tensor in row]) for row in rows])
