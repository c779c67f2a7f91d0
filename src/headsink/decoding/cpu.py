"""Compiled decode step on a CPU: one numba call over the model's weights and its cache (decoding/kernel.py) for one token of
every sequence, or for a few, which are read at once and have the same logits, bit for bit, as one after the other.

Activations stay in float32, so in bfloat16 the logits are closer to those of the exact model than the model's own are.
"""

from __future__ import annotations

import inspect
import weakref
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.cpu.backend import NUMPY, CPUBackend
from headsink.attention.cpu.threads import claim, exclusive_threads, usable
from headsink.attention.formats import KVDtype, encode
from headsink.attention.kv_table import KVField, advance
from headsink.attention.params import AttentionParams
from headsink.attention.passes import enter_scope, extended
from headsink.attention.visibility import KeyVisibility
from headsink.cache.buffers import Overwritten
from headsink.cache.cache import PlanCache
from headsink.cache.kv_table import KVTable
from headsink.cache.layer import PlanLayer
from headsink.decoding.checks import CacheCheck
from headsink.decoding.fields import Field, Number
from headsink.decoding.parts import parts_of
from headsink.decoding.program import Program
from headsink.errors import HeadsinkError, must_be
from headsink.eviction.pattern import FOREVER
from headsink.models.devices import dtype_name
from headsink.models.spec import decoder, describe, unwrap, vocabulary
from headsink.models.transformers_names import cache_argument, given_cache
from headsink.plan.plan import Plan

AHEAD = 64  # tokens that buffers and positions are made ready for at once
SEVERAL = 16  # tokens of a sequence that activations have room for once there are several, or more if there are more
SAME = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative difference of logits that differ by rounding

_checked: weakref.WeakKeyDictionary[PreTrainedModel, dict[torch.dtype, str | None]] = weakref.WeakKeyDictionary()


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model has no compiled decode step; None if it has one.

    The first call compares the step with the model: two passes over a few tokens.
    """
    shape = describe(model)
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'headsink[cpu]'"
    if others := set(shape.kinds) - {"full_attention", "sliding_attention"}:
        return f"this model has layers of kind {', '.join(sorted(others))}"
    if not shape.prefix_free:
        return "its rotary positions depend on the length of the sequence"
    if "position_ids" not in inspect.signature(unwrap(model).forward).parameters:
        return "it takes no position_ids"
    if model.training:
        return "it is in training mode: call model.eval()"
    if not usable():
        return "this process was forked after compiled code had run"
    if any(hasattr(m, "base_layer") for m in model.modules()):
        return "its layers have a PEFT adapter: call model.merge_and_unload()"
    devices = {weight.device.type for weight in (*model.parameters(), *model.buffers())}
    if devices != {"cpu"}:
        return "its weights are offloaded" if "meta" in devices else "it is not on the CPU"
    if any(extended(m) for layer in _blocks(model) for m in layer.modules()):
        return "its layers have hooks or another forward, which the step would not call"
    kinds = {weight.dtype for weight in model.parameters()}
    if len(kinds) > 1 or not kinds <= SAME.keys():
        return f"its weights are {', '.join(sorted(map(dtype_name, kinds)))}, not float32 or bfloat16"
    try:
        parts_of(model)
        found = _checked.setdefault(model, {})
        if model.dtype not in found:
            found[model.dtype] = _difference(model)
    except HeadsinkError as error:
        return str(error)
    return found[model.dtype]


def _blocks(model: PreTrainedModel) -> list[Any]:
    return [m for m in decoder(model).children() if isinstance(m, torch.nn.ModuleList)]


@torch.no_grad()
def _difference(model: PreTrainedModel) -> str | None:
    """Why the step is not used: its logits are not those of the model, close to the start of a text or far from it.

    One of two tokens may differ, since a bfloat16 model may choose other experts where two are nearly tied.
    """
    plan, shape = Plan.full(model), describe(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary(model), (1, 7), generator=generator)
    far, errors = min(shape.max_context, 2**20) - 2, list[float]()
    with enter_scope(model, plan, lambda given, _: given_cache(given), private=True):
        caches = [PlanCache(plan, shape) for _ in range(2)]
        for cache in caches:
            model(ids[:, :3], **cache_argument(cache), use_cache=True)
        step = Decoder(model, caches[0])
        for column, position in ((3, 3), (4, 4), (5, far), (6, far + 1)):
            token, at = ids[:, column], torch.tensor([position])
            expected = (
                model(token[None], position_ids=at[None], **cache_argument(caches[1]), use_cache=True)
                .logits[0, -1]
                .float()
            )
            found = step.run(token, at)[0]
            errors.append(float((found - expected).norm() / expected.norm()))
    same = max(min(errors[:2]), min(errors[2:])) <= SAME[model.dtype]
    return None if same else "its layers compute something that the step does not"


def prepare(model: PreTrainedModel, kv_dtype: KVDtype) -> None:
    """Compile the kernels: about a minute the first time on a machine, then loaded from numba's cache."""
    claim()
    from headsink.decoding import kernel

    key = torch.zeros(1, 1, 1, 32, dtype=model.dtype)
    kernels, params = CPUBackend(), AttentionParams(1.0)
    rows = encode(kv_dtype, key, key)
    kernels.decode(key, *rows, key[..., 0] == 0, 1, params)
    kernels.prefill(key, key[0], key[0], KeyVisibility(torch.ones(1, 1), 0, 0, 0, None, False, 0, 0), params)
    operations = np.zeros((0, len(Field)), np.int64)  # a model without layers
    numbers, heads = np.zeros((0, len(Number)), np.float32), np.zeros((1, 0, len(KVField)), np.int64)
    turns, scratch = np.zeros((2, 0, 0, 0), np.float32), np.zeros(0, np.float32)
    likes = [np.empty(0, NUMPY[kind]) for kind in (model.dtype, *(one.dtype for one in rows))]
    kernel.run(operations, numbers, heads, turns, scratch, *likes, 1, 1)


class Decoder:
    """The weights and the cache of a model in the form that the kernel reads.

    Memory addresses are read once, so neither may change between calls. The tensors are referenced: after a change there is an
    error or the old weights are used, but never an access to freed memory.
    """

    def __init__(self, model: PreTrainedModel, cache: PlanCache):
        claim()
        from headsink.decoding import kernel  # numba takes a second to import

        self.kernels, self.plan, self.warns = kernel, cache.plan, True  # not the cache: see `token.TokenSteps`
        self.stack = cast(Any, decoder(model))
        self.parts, self.shape = parts_of(model), describe(model)
        self.layers = [layer for layer in cache.layers if isinstance(layer, PlanLayer)]
        self.parameters = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.addresses = [weight.data_ptr() for weight in self.parameters]
        self.dtype = self.parameters[1].dtype
        self.cache_check = CacheCheck(self.shape, self.layers, self.dtype)
        first = self.layers[0].groups[0]
        self.likes = [np.empty(0, NUMPY[kind]) for kind in (self.dtype, first.keys.dtype, first.values.dtype)]
        self.length = cache.get_seq_length()
        self.begun = self.ready = self.length  # first and last column of the allocated room
        rotaries = [layer.options.rotary for layer in self.layers]
        self.turned = [number for number, rotary in enumerate(rotaries) if rotary is not None]
        self.inverse = [rotary.inverse.double().numpy() for rotary in rotaries if rotary is not None]
        self.program: Program | None = None  # of the cache's number of sequences
        # A window of the model overwrites keys, of which a pass may overwrite each once.
        windows = [layer.sliding for layer in self.layers if layer.sliding is not None]
        self.most = 1 if self.turned else min(windows, default=FOREVER)  # tokens of a pass at most
        self.overwritten = list[Overwritten]()  # by the last `read`, if it read several tokens
        self.angles: dict[str, tuple[Any, Any]] = {}
        self.layouts = {kind: self._angle_layout(kind) for kind in sorted(set(self.shape.kinds))}

    def resume(self) -> None:
        """Continue after other code has changed the cache."""
        self.cache_check = CacheCheck(self.shape, self.layers, self.dtype)
        self.length = self.ready = self.cache_check.length

    def run(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append one token per sequence, int64 [sequences]. positions: by default they follow the cached tokens.

        Returns the logits of the next tokens, float32 [sequences, vocabulary].
        """
        return self.read(tokens[:, None], None if positions is None else positions[:, None])[:, 0]

    def read(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append tokens to every sequence, int64 [sequences, tokens].

        Returns the logits after each of them, float32 [sequences, tokens, vocabulary]: the same bits as one after the other.
        """
        self.cache_check.check(tuple(tokens.shape[:-1]))
        if [weight.data_ptr() for weight in self.parameters] != self.addresses:
            raise HeadsinkError("decode: the model was changed since the step was made: make a new one")
        if positions is not None:
            must_be("decode: positions", positions.shape, tokens.shape)
        with torch.no_grad():
            embedded = self.parts.embedding(tokens)
        logits, done, count, self.overwritten = list[Tensor](), 0, tokens.shape[1], []
        while done < count:
            if self.length + count - done > self.ready:
                self._make_ready(count - done)
            new = slice(done, min(count, done + self.most, done + self.ready - self.length))
            if count > 1:
                self._save(new.stop - done)
            logits.append(self._read(embedded[:, new], None if positions is None else positions[:, new]))
            done = new.stop
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def _read(self, embedded: Tensor, positions: Tensor | None) -> Tensor:
        """As `read`, of tokens for which there is room. embedded: [sequences, tokens, hidden]."""
        length, count = self.length, embedded.shape[1]
        self.plan.check_length(length + count, self.shape.max_context)
        if self.warns and length <= (self.plan.verified or -1) < length + count:  # the prefill warns of longer prompts
            self.plan.warn_beyond_verified(length + count)
        program = self._program(count)
        heads = np.stack([advance(self.heads.copy(), length + n) for n in range(count)])
        rows = len(self.pads) * count
        program.hidden[:rows] = embedded.float().flatten(0, 1).numpy() * self.parts.scale
        own = None if positions is None else self._rotations(positions)
        new = slice(None) if own is not None else slice(length - self.begun, length - self.begun + count)
        for kind, places in program.angles.items():
            for place, angles in zip(places, (self.angles if own is None else own)[kind], strict=True):
                place[:rows] = np.broadcast_to(angles[:, new], (len(self.pads), count, place.shape[1])).reshape(
                    rows, -1
                )
        with exclusive_threads() as threads:
            scratch = np.empty(program.scratch * count * threads, np.float32)
            self.kernels.run(
                program.operations,
                program.numbers,
                heads,
                self._turns(length),
                scratch,
                *self.likes,
                len(self.pads),
                threads,
            )
        self.length += count
        return torch.from_numpy(program.logits[:rows].reshape(len(self.pads), count, -1)).clone()

    def _save(self, count: int) -> None:
        """Keep what the next tokens overwrite in windows of the model, for `crop`."""
        columns = torch.arange(self.length, self.length + count)
        for layer in self.layers:
            for group in layer.groups if layer.sliding is not None else ():
                if (old := group.overwrites(columns)) is not None:
                    self.overwritten.append(old)

    def crop(self, tokens: int) -> None:
        """Take back the last tokens of the last `read`, in a cache without patterns that evict."""
        if any(group.evicts for layer in self.layers if layer.sliding is None for group in layer.groups):
            raise HeadsinkError("decode: a cache that evicts cannot take tokens back")
        self.length -= tokens
        for old in reversed(self.overwritten):
            old.restore(self.length)
        self.overwritten = []
        if self.length < self.begun:
            self.ready = self.length
        self.start_evicting()

    def start_evicting(self) -> None:
        """Update the cache's lengths with the tokens that were appended."""
        for layer in self.layers:
            layer.seen = self.length
            for group in layer.groups:
                group.length = self.length
        self.cache_check.length = self.length

    def _make_ready(self, count: int) -> None:
        """Allocate room in the buffers and rotary positions for the next tokens, and rebuild the KV table.

        count: tokens that come next. There may be room for fewer, if a head starts evicting then.
        """
        self.start_evicting()
        ahead = max(AHEAD, count)
        for layer in self.layers:
            layer.layout = None  # it has the addresses of buffers that may move now
        layouts = [KVTable(layer.groups, ahead) for layer in self.layers]
        # buffers may have been reallocated
        self.cache_check = CacheCheck(self.shape, self.layers, self.dtype)
        self.begun, self.ready = self.length, min(self.length + ahead, *(layout.until for layout in layouts))
        self.heads = np.concatenate([layout.table.reshape(-1, len(KVField)) for layout in layouts])
        self.pads = layouts[0].table[:, :1, KVField.PAD]
        columns = torch.arange(self.length, self.length + ahead)
        self.angles = self._rotations((columns - torch.from_numpy(self.pads)).clamp(min=0))

    def _program(self, tokens: int) -> Program:
        """The program for the cache's sequences, with room for as many tokens of each, or more."""
        found, sequences = self.program, len(self.pads)
        if found is None or found.sequences != sequences or found.tokens < tokens:
            pairs = {kind: cos.shape[2] for kind, (cos, _) in self.angles.items()}
            most = tokens if tokens == 1 else max(tokens, SEVERAL)
            self.program = found = Program(self.parts, sequences, most, pairs, self.turned)
        return found

    def _rotations(self, positions: Tensor) -> dict[str, tuple[Any, Any]]:
        """cos and sin of positions, int64 [sequences, tokens], for every kind of layer: float32 [sequences, tokens, pairs]."""
        found = dict[str, tuple[Any, Any]]()
        for kind, part in self.layouts.items():
            cos, sin = (own.float()[..., part].numpy() for own in self._angles(positions, kind))
            found[kind] = cos, sin
        return found

    def _angles(self, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """cos and sin as the model computes them."""
        rotary = getattr(self.stack, "rotary_emb", None)
        if rotary is None:
            none = torch.zeros(*positions.shape, 0)
            return none, none
        given = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
        cos, sin = rotary(torch.empty(0), positions, **given)
        return cos, sin

    def _angle_layout(self, kind: str) -> slice:
        """The columns of cos and sin with one number per pair: models repeat them side by side, one after the other, or not."""
        values = self._angles(torch.tensor([[7]]), kind)[1]
        width = values.shape[-1]
        if not width or width % 2:
            return slice(None)
        if torch.equal(values[..., ::2], values[..., 1::2]):
            return slice(0, None, 2)
        return slice(0, width // 2 if torch.equal(*values.chunk(2, -1)) else None)

    def _turns(self, length: int) -> Any:
        """cos and sin of the angles by which queries are rotated for the sink tokens, for layers with cache-relative positions.

        float32 [2, layers, sequences x KV heads, pairs].
        """
        if not self.turned:
            return np.zeros((2, 0, 0, 0), np.float32)
        layers = [self.layers[number] for number in self.turned]
        last = np.zeros((len(layers), 1, len(layers[0].patterns)), np.int64)
        for number, layer in enumerate(layers):
            for group in layer.groups:
                last[number, 0, group.heads] = group.pattern.sink + (group.pattern.window or 0) - 1
        distance = np.maximum(length - self.pads[None] - last, 0)
        angles = -distance.reshape(len(layers), -1, 1) * np.stack(self.inverse)[:, None]
        return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
