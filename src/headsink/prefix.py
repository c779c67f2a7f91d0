"""A context that was read once, kept in a file: a plan's cache, with the tokens that it was made of.

One safetensors file. Its tensors are the buffers of every head group as they lie in memory (slots.py), those of layers
that slide by themselves, the tokens and the padding; its header holds the plan and, of each group, which slots mean what, as
JSON. Loading copies them back: no token is read, or told, again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from headsink.cache import PlanCache, PlanLayer
from headsink.errors import HeadsinkError
from headsink.files import new_file
from headsink.head_group import HeadGroup
from headsink.models import dtype_name
from headsink.pattern import Pattern
from headsink.plan import Plan
from headsink.runtime import new_cache
from headsink.slots import Padding

BUFFERS = "keys", "values", "visible", "scores"  # of a head group
STATE = "window", "anchors", "start", "length", "young"

Count = Annotated[int, Field(ge=0, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Group(_Part):
    """Which slots of a group's buffers mean what. window: the group's own, which `hold` ends; the pattern's is what it was."""

    heads: tuple[Count, ...]
    pattern: tuple[Count, Count, Count | None]  # sink, floating, window
    window: Count | None
    anchors: Count
    start: Count
    length: Count
    young: Annotated[bool, Field(strict=True)] = False

    @classmethod
    def of(cls, group: HeadGroup) -> _Group:
        own = {name: getattr(group, name) for name in STATE}
        pattern = group.pattern.sink, group.pattern.floating, group.pattern.window
        return cls(heads=tuple(group.heads), pattern=pattern, **own)


class _Layer(_Part):
    """What tells how to read a layer's tensors. groups: none in a layer that slides by itself."""

    seen: Annotated[int, Field(gt=0, strict=True)]
    held: bool = False
    groups: tuple[_Group, ...] = ()


class _Header(_Part):
    format: Literal["headsink prefix 1"] = "headsink prefix 1"
    plan: Plan
    layers: tuple[_Layer, ...]
    text: str = ""
    exact: Annotated[bool, Field(strict=True)] = True


def save_prefix(
    path: str | os.PathLike[str], cache: PlanCache, input_ids: Tensor, text: str = "", *, force: bool = False
) -> Path:
    """Write a cache and the tokens in it to a file, atomically.

    cache: filled under a plan, or compressed once (`headsink.compress`). input_ids: int [batch, tokens], all that it has seen,
    left padding included. text: the same as a string, if that is wanted later. force:
    replace a file, too, that headsink did not write. Raises HeadsinkError if the two differ in
    length, if the cache is empty, or if it waits for tokens to be taken back.
    """
    seen = _seen(cache)
    if not seen[1] or tuple(input_ids.shape) != seen:
        given, held = (" x ".join(map(str, shape)) for shape in (input_ids.shape, seen))
        raise HeadsinkError(f"input_ids: {given} tokens given, the cache has seen {held}")
    tensors, layers = {"input_ids": input_ids.long()}, []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PlanLayer):
            tensors |= {f"layers.{index}.keys": layer.keys, f"layers.{index}.values": layer.values}
            layers.append(_Layer(seen=layer.get_seq_length()))
            continue
        for number, group in enumerate(layer.groups):
            if group.recent is not None:
                raise HeadsinkError("this cache still waits for tokens to be taken back: set its record_past to False")
            tensors |= {f"layers.{index}.{number}.{name}": getattr(group, name) for name in BUFFERS}
            if group.padding is not None:
                tensors["padding"] = group.padding.tokens
        layers.append(_Layer(seen=layer.seen, held=layer.held, groups=tuple(map(_Group.of, layer.groups))))
    header = _Header(plan=cache.plan, layers=tuple(layers), text=text, exact=cache.exact)
    with new_file(path, force) as part:
        save_file({name: t.contiguous() for name, t in tensors.items()}, part, {"headsink": header.model_dump_json()})
    return Path(path)


def load_prefix(path: str | os.PathLike[str], model: PreTrainedModel) -> tuple[PlanCache, Tensor]:
    """A cache from a file, ready for what comes after, and the tokens that it has seen, int64 [batch, tokens].

    Use it inside `apply(model, cache.plan)`: `model.generate(ids, past_key_values=cache)`, where `ids` begins with those tokens.
    Raises HeadsinkError if the file is not one of `save_prefix`, or was made for another model or dtype.
    """
    header, tensors = _read(path)
    cache = new_cache(model, header.plan, header.exact)
    kinds = {dtype_name(t.dtype) for name, t in tensors.items() if name.endswith((".keys", ".values"))}
    if kinds != {dtype_name(model.dtype)}:
        raise HeadsinkError(
            f"{path}: its keys and values are {', '.join(sorted(kinds))}, the model is {dtype_name(model.dtype)}"
        )
    try:
        ids, padding = tensors["input_ids"], tensors.get("padding")
        pad = None if padding is None else Padding(padding.to(model.device), int(padding.max()))
        for index, (layer, state) in enumerate(zip(cache.layers, header.layers, strict=True)):
            start = f"layers.{index}."
            own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
            # Copied even on a CPU: in the file they are not aligned, which sums in another order.
            _restore(layer, state, {name: t.to(model.device, copy=True) for name, t in own.items()}, pad)
            if state.seen != ids.shape[1] or any(t.shape[0] != len(ids) for t in own.values()):
                raise ValueError(f"layer {index} is of other tokens")
        if padding is not None and padding.shape != ids.shape[:1]:
            raise ValueError("the padding is of other texts")
    except (KeyError, IndexError, ValueError) as error:
        raise HeadsinkError(f"{path}: its parts do not fit together: {error}") from error
    return cache, ids.to(model.device)


def prefix_text(path: str | os.PathLike[str]) -> str:
    """The text that was given to `save_prefix`."""
    return _read(path, tensors=False)[0].text


def _read(path: str | os.PathLike[str], tensors: bool = True) -> tuple[_Header, dict[str, Tensor]]:
    try:
        os.stat(path)  # says what is wrong in fewer words than safe_open
        with safe_open(path, "pt") as file:
            header = _Header.model_validate_json((file.metadata() or {}).get("headsink", ""))
            return header, {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except OSError as error:
        raise HeadsinkError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValidationError) as error:
        raise HeadsinkError(f"{path}: not a prefix that headsink has saved") from error


def _restore(layer: CacheLayerMixin, state: _Layer, tensors: dict[str, Tensor], padding: Padding | None) -> None:
    """Fill an empty layer. Raises KeyError or ValueError for tensors that are missing or of a wrong shape."""
    if isinstance(layer, PlanLayer):
        layer.groups = [
            _restored(group, layer, {name: tensors[f"{number}.{name}"] for name in BUFFERS}, padding)
            for number, group in enumerate(state.groups)
        ]
        if sorted(head for group in layer.groups for head in group.heads) != list(range(len(layer.patterns))):
            raise ValueError("each head must be in one group")
        layer.seen, layer.held, layer.is_initialized = state.seen, state.held, True
        return
    keys, values = tensors["keys"], tensors["values"]
    if keys.shape != values.shape or keys.dim() != 4 or keys.shape[2] != min(state.seen, layer.sliding_window - 1):
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} of a layer that slides")
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, state.seen


def _restored(state: _Group, layer: PlanLayer, buffers: dict[str, Tensor], padding: Padding | None) -> HeadGroup:
    """A group as it was. Raises ValueError if the buffers do not belong to it."""
    keys, pattern = buffers["keys"], Pattern(*state.pattern)
    batch, _, slots, dim = keys.shape
    floating, heads = buffers["scores"].shape[-1], len(state.heads)
    shapes: dict[str, tuple[int, ...]] = {"keys": (batch, heads, slots, dim), "values": (batch, heads, slots, dim)}
    shapes |= {"visible": (batch, heads, slots), "scores": (batch, heads, floating)}
    ring = state.length - state.start if state.window is None else min(state.length, state.window)
    whole = pattern.window is not None and state.window is None  # nothing was let go of late: held, or young still
    held = whole and not state.young
    anchors = state.anchors if held else 0 if state.young else pattern.sink + floating
    enough = anchors == state.anchors and 0 <= ring <= slots - anchors
    if state.young:
        enough &= whole and state.start == 0 and pattern.size(state.length) == state.length
    if any(tuple(buffers[name].shape) != shape for name, shape in shapes.items()) or not enough:
        raise ValueError(f"buffers {[list(b.shape) for b in buffers.values()]} of {state}")
    exact = layer.exact and heads == len(layer.patterns)
    group = HeadGroup(pattern, list(state.heads), layer.weights, keys, padding, layer.inverse, exact)
    for name in BUFFERS:
        setattr(group, name, buffers[name])
    for name in STATE:
        setattr(group, name, getattr(state, name))
    if held:
        group.weights = group.weights[:0].clone()  # as `hold` leaves it
    return group


def _seen(cache: PlanCache) -> tuple[int, int]:
    """Texts and tokens, 0 and 0 of an empty cache."""
    first, tokens = cache.layers[0], cache.get_seq_length()
    if not tokens:
        return 0, 0
    return first.batch_size if isinstance(first, PlanLayer) else first.keys.shape[0], tokens
