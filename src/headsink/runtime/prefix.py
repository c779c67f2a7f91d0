"""Prefix files: save a cache with the tokens that filled it, so that a context is prefilled once and used by many processes.

runtime/prefix_format.py says what is in a file, and checks it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.formats import decode
from headsink.attention.params import Padding
from headsink.cache.cache import PlanCache
from headsink.cache.head_group import HeadGroup
from headsink.cache.layer import PlanLayer
from headsink.errors import HeadsinkError
from headsink.eviction.scorers import NONE
from headsink.models.devices import dtype_name
from headsink.models.distributed import input_device
from headsink.models.spec import Architecture, vocabulary
from headsink.plan.plan import Plan
from headsink.runtime.apply import new_cache
from headsink.runtime.prefix_format import Group, Header, check_parts, groups_of, layers_of, padding_of, read_file
from headsink.utils.files import new_file


def save_prefix(
    path: str | os.PathLike[str], cache: PlanCache, input_ids: Tensor, text: str = "", *, force: bool = False
) -> Path:
    """Write a cache and its tokens to a file, atomically. Returns the path.

    cache: filled under a plan, or compressed by `headsink.compress`. input_ids: int [batch, tokens], all tokens that the cache
    has seen, left padding included. text: the same as a string, for `prefix_text`. force: also replace a file that headsink did
    not write. Raises HeadsinkError if cache and input_ids differ in length, and if the cache is empty or frozen, records tokens
    for `crop`, hides tokens between others, or contains NaN.
    """
    rows, seen = _count_tokens(cache)
    if not seen or tuple(input_ids.shape) != (rows, seen):
        given, cached = (" x ".join(map(str, shape)) for shape in (input_ids.shape, (rows, seen)))
        raise HeadsinkError(f"input_ids: {given} tokens given, the cache has seen {cached}")
    if cache.frozen:
        raise HeadsinkError("this cache is frozen and no longer evicts: save it before freeze()")
    if any(group.recent is not None for group in _cache_groups(cache)):
        raise HeadsinkError("this cache records tokens so that they can be cropped: set its record_past to False")
    hidden = [
        group.holes or (group.padding is not None and group.padding.hidden is not None)
        for group in _cache_groups(cache)
    ]
    if any(hidden):
        raise HeadsinkError(
            "this cache hides tokens between visible ones: save it before the second turn of its conversations"
        )
    if not all(isinstance(layer, PlanLayer) for layer in cache.layers):
        raise HeadsinkError(
            "this cache has layers without attention, or with chunked attention; prefix files do not hold them"
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise HeadsinkError(f"input_ids: {dtype_name(input_ids.dtype)} given, token ids are whole numbers")
    try:
        header = _header(cache, seen, text)
        tensors = {"input_ids": input_ids.long()} | _tensors(header, cache)
        check_parts(header, tensors, cache)
    except ValueError as error:
        raise HeadsinkError(f"this cache cannot be saved: {error}") from error
    with new_file(path, force) as part:
        save_file({name: t.contiguous() for name, t in tensors.items()}, part, {"headsink": header.model_dump_json()})
    return Path(path)


def load_prefix(path: str | os.PathLike[str], model: PreTrainedModel) -> tuple[PlanCache, Tensor]:
    """Load a cache and the tokens that it has seen, int64 [batch, tokens], from a file written by `save_prefix`.

    Use the cache inside `apply(model, cache.plan)`: `model.generate(ids, cache=cache)`, where `ids` begins with those tokens.
    Raises HeadsinkError if the file is not a prefix, if its parts do not fit together, or if it was made for another model or
    dtype.
    """
    header, tensors = read_file(path)
    if header.dtype != dtype_name(model.dtype):
        raise HeadsinkError(f"{path}: it was made in {header.dtype}, the model is {dtype_name(model.dtype)}")
    how: dict[str, Any] = {"prefill": header.prefill, "chunk_size": header.chunk_size, "kv_dtype": header.kv_dtype}
    cache = new_cache(model, header.plan, header.exact, **how)
    try:
        check_parts(header, tensors, cache, vocabulary(model) - 1)
    except ValueError as error:
        raise HeadsinkError(f"{path}: its parts do not fit together: {error}") from error
    # Copied even on a CPU: tensors in the file are not aligned, which changes the order of sums.
    _fill(cache, header, {name: t.to(input_device(model), copy=True) for name, t in tensors.items()})
    return cache, tensors["input_ids"].to(input_device(model))


def prefix_text(path: str | os.PathLike[str]) -> str:
    """The `text` that was passed to `save_prefix`."""
    return read_file(path, ())[0].text


def prefix_tokens(path: str | os.PathLike[str]) -> list[int]:
    """The tokens of a prefix of one text."""
    ids = read_file(path, ("input_ids",))[1].get("input_ids", torch.empty(0, 0))
    if len(ids) != 1:
        raise HeadsinkError(f"{path}: it must hold one text")
    return [int(token) for token in ids[0]]


class PrefixHead(NamedTuple):
    """What a KV head holds of a prefix: its sink tokens, then its top-k keys, then its window in order of the text.

    keys, values: [keys, dim]. scores: float32 [keys], `NONE` for keys other than top-k keys. positions: int64 [keys]; files do
    not have those of top-k keys, which get that of the first token after the sink tokens.
    """

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor


def prefix_heads(
    path: str | os.PathLike[str], plan: Plan, shape: Architecture
) -> tuple[list[int], list[list[PrefixHead]]]:
    """Return the tokens of a prefix and the KV heads of each layer, for engines with a cache of their own.

    shape: of the model. Raises HeadsinkError if the file is not a prefix of a single text without padding under this plan.
    """
    header, tensors = read_file(path)
    if not header.plan.same_rules(plan):
        raise HeadsinkError(f"{path}: it was made under another plan")
    cache = PlanCache(header.plan, shape, exact=header.exact, kv_dtype=header.kv_dtype)
    try:
        check_parts(header, tensors, cache)
        groups = list(groups_of(header, cache))
    except ValueError as error:
        raise HeadsinkError(f"{path}: its parts do not fit together: {error}") from error
    if len(tensors["input_ids"]) > 1 or padding_of(tensors).any():
        raise HeadsinkError(f"{path}: it must hold one text without padding")
    found: list[list[PrefixHead]] = []
    for layer in layers_of(cache):
        row: dict[int, PrefixHead] = {}
        for pattern in dict.fromkeys(layer.patterns):
            heads = [head for head, own in enumerate(layer.patterns) if own == pattern]
            row |= zip(heads, _split(header, groups.pop(0), tensors), strict=True)
        found.append([row[head] for head in range(len(row))])
    return tensors["input_ids"][0].tolist(), found


def _split(header: Header, group: Group, tensors: dict[str, Tensor]) -> Iterator[PrefixHead]:
    """The heads of a group."""
    first, sinks = header.seen - group.recent, group.pattern.sink if group.evicts else 0
    columns = torch.arange(first, header.seen).roll((first - group.start) % max(group.recent, 1))
    top_k = group.prefix_slots - sinks
    order = torch.cat([torch.arange(group.prefix_slots), group.prefix_slots + columns.argsort()])
    positions = torch.cat([torch.arange(sinks), torch.full((top_k,), sinks), columns.sort().values])
    keys, values = (tensors[group.name + name][0][:, order] for name in ("keys", "values"))
    keys, values = decode(header.kv_dtype, keys, values, getattr(torch, header.dtype))
    scores = torch.full(keys.shape[:2], NONE)
    if "scores" in group.stored:
        scores[:, sinks : group.prefix_slots] = tensors[group.name + "scores"][0].float()
    filled = torch.ones_like(scores, dtype=torch.bool)
    filled[:, sinks : group.prefix_slots] = scores[:, sinks : group.prefix_slots] > NONE
    for head, kept in enumerate(filled):
        yield PrefixHead(keys[head, kept], values[head, kept], scores[head, kept], positions[kept])


def _header(cache: PlanCache, seen: int, text: str) -> Header:
    """The header for a cache. Raises ValueError if its layers differ in tokens."""
    for index, layer in enumerate(cache.layers):
        if layer.get_seq_length() != seen:
            raise ValueError(f"layer {index} has seen {layer.get_seq_length()} tokens, layer 0 has seen {seen}")
    return Header.model_validate(
        {
            "plan": cache.plan,
            "dtype": dtype_name(_cache_groups(cache)[0].dtype),
            "kv_dtype": cache.kv_dtype,
            "exact": cache.exact,
            "seen": seen,
            "prefill": "dense" if cache.prefill.dense else "sparse",
            "chunk_size": cache.prefill.chunk_size,
            **{
                field: [tuple(getattr(group, name) for group in layer.groups) for layer in layers_of(cache)]
                for field, name in (("prefix_slots", "prefix_slots"), ("starts", "start"))
            },
            "text": text,
        }
    )


def _count_tokens(cache: PlanCache) -> tuple[int, int]:
    """Rows and tokens of a cache; 0 and 0 if it is empty."""
    tokens = cache.get_seq_length()
    return (cache.rows, tokens) if tokens else (0, 0)


def _cache_groups(cache: PlanCache) -> list[HeadGroup]:
    return [group for layer in cache.layers if isinstance(layer, PlanLayer) for group in layer.groups]


def _tensors(header: Header, cache: PlanCache) -> dict[str, Tensor]:
    """The parts in use of a cache's buffers."""
    tensors: dict[str, Tensor] = {}
    for group, live in zip(groups_of(header, cache), _cache_groups(cache), strict=True):
        tensors |= {group.name + name: getattr(live, name)[:, :, : group.slots] for name in group.stored}
        if live.padding is not None:
            tensors["padding"] = live.padding.tokens.clamp(max=header.seen)  # a row may be padding only so far
    return tensors


def _fill(cache: PlanCache, header: Header, tensors: dict[str, Tensor]) -> None:
    """Fill an empty cache with checked tensors."""
    rows = len(tensors["input_ids"])
    tokens = tensors.get("padding")
    padding = None if tokens is None or not tokens.any() else Padding(tokens, int(tokens.max()))
    for layer, (_, heads, dim) in zip(layers_of(cache), cache.heads, strict=True):
        none = torch.empty(rows, heads, 0, dim, dtype=getattr(torch, header.dtype)).to(tensors["input_ids"].device)
        layer.fill(none, none, padding)
        layer.seen = header.seen
    for group, live in zip(groups_of(header, cache), _cache_groups(cache), strict=True):
        for name in group.stored:
            setattr(live, name, tensors[group.name + name])
        if group.evicts:
            live.below_capacity, live.window, live.prefix_slots = False, group.pattern.window, group.prefix_slots
            live.start = group.start
        live.length, live.visible = header.seen, _visible(header, tensors, group, live.scores)


def _visible(header: Header, tensors: dict[str, Tensor], group: Group, scores: Tensor) -> Tensor:
    """Visible slots of a group: bool [rows, heads, slots]. scores: of its top-k keys."""
    seen, sinks = header.seen, group.pattern.sink if group.evicts else 0
    padding, first = padding_of(tensors)[:, None, None], seen - group.recent
    columns = torch.arange(first, seen, device=scores.device).roll((first - group.start) % max(group.recent, 1))
    evicted = first - padding
    parts = torch.arange(sinks, device=scores.device) < evicted, scores > NONE, columns >= padding
    return torch.cat([part.expand(-1, group.heads, -1) for part in parts], 2)
