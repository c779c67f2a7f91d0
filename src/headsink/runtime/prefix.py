"""Prefix files: save a cache with the tokens that filled it, so that a context is prefilled once and used by many processes.

A prefix is one safetensors file. Its header holds the plan and a few numbers, which determine the state of every head group and
the dtype and shape of every tensor (`_expected`). A file with other tensors is refused before a kernel reads it. The tensors are
the keys and values in use, in their order in memory (cache/slots.py), so that sums are equal bit for bit after loading. Which
slots are visible follows from the header.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.params import Padding
from headsink.cache.cache import PlanCache
from headsink.cache.head_group import HeadGroup
from headsink.cache.layer import PlanLayer
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import Pattern
from headsink.eviction.scorers import ALWAYS, NONE
from headsink.models.devices import dtype_name
from headsink.models.distributed import input_device
from headsink.models.spec import vocabulary
from headsink.plan.plan import Plan
from headsink.runtime.apply import Prefill, new_cache
from headsink.utils.files import new_file

OLD = ("headsink prefix 1", "headsink prefix 2", "headsink prefix 3", "headsink prefix 4", "headsink prefix 5")

Count = Annotated[int, Field(ge=0, strict=True)]


class _Header(BaseModel):
    """Metadata of a prefix file.

    dtype: of keys and values. seen: tokens of every row, padding included. prefix_slots: for every group of every layer, slots in
    front of its ring. starts: the column in the first slot of that ring, before it wraps. text, exact, prefill, chunk_size: as
    for `save_prefix` and `new_cache`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headsink prefix 6"] = "headsink prefix 6"
    plan: Plan
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    exact: Annotated[bool, Field(strict=True)]
    seen: Annotated[int, Field(gt=0, strict=True)]
    prefill: Prefill
    chunk_size: Annotated[int, Field(gt=0, strict=True)] | None
    prefix_slots: tuple[tuple[Count, ...], ...]
    starts: tuple[tuple[Count, ...], ...]
    text: str


class _Group(NamedTuple):
    """State of a head group, derived from the header.

    name: prefix of its tensors' names. pattern: while decoding. evicts: whether its slots are sink slots, top-k slots and a ring
    of the pattern's window; otherwise they are a ring with every token. recent: tokens in the ring. slots: number in use. stored:
    its tensors.
    """

    name: str
    heads: int
    head_dim: int
    pattern: Pattern
    evicts: bool
    prefix_slots: int
    start: int
    recent: int
    slots: int
    stored: tuple[str, ...]


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
        _check(header, tensors, cache)
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
    header, tensors = _read(path)
    if header.dtype != dtype_name(model.dtype):
        raise HeadsinkError(f"{path}: its keys and values are {header.dtype}, the model is {dtype_name(model.dtype)}")
    cache = new_cache(model, header.plan, header.exact, prefill=header.prefill, chunk_size=header.chunk_size)
    try:
        _check(header, tensors, cache, vocabulary(model) - 1)
    except ValueError as error:
        raise HeadsinkError(f"{path}: its parts do not fit together: {error}") from error
    # Copied even on a CPU: tensors in the file are not aligned, which changes the order of sums.
    _fill(cache, header, {name: t.to(input_device(model), copy=True) for name, t in tensors.items()})
    return cache, tensors["input_ids"].to(input_device(model))


def prefix_text(path: str | os.PathLike[str]) -> str:
    """The `text` that was passed to `save_prefix`."""
    return _read(path, tensors=False)[0].text


def _read(path: str | os.PathLike[str], tensors: bool = True) -> tuple[_Header, dict[str, Tensor]]:
    try:
        os.stat(path)  # gives a shorter error message than safe_open
        with safe_open(path, "pt") as file:
            header = _Header.model_validate_json((file.metadata() or {}).get("headsink", ""))
            return header, {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except OSError as error:
        raise HeadsinkError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise HeadsinkError(f"{path}: not a prefix that headsink has saved") from error
    except ValidationError as error:
        if any(e["loc"] == ("format",) and e["input"] in OLD for e in error.errors()):
            command = f"headsink prefill MODEL --plan PLAN --file DOCUMENT --out {path}"
            raise HeadsinkError(f"{path}: saved by an older headsink; read the document again: {command}") from error
        first = error.errors()[0]
        field, reason = ".".join(map(str, first["loc"])) or "header", first["msg"].removeprefix("Value error, ")
        raise HeadsinkError(f"{path}: not a prefix that headsink has saved: {field!r}: {reason}") from error


# saving


def _header(cache: PlanCache, seen: int, text: str) -> _Header:
    """The header for a cache. Raises ValueError if its layers differ in tokens."""
    for index, layer in enumerate(cache.layers):
        if layer.get_seq_length() != seen:
            raise ValueError(f"layer {index} has seen {layer.get_seq_length()} tokens, layer 0 has seen {seen}")
    return _Header.model_validate(
        {
            "plan": cache.plan,
            "dtype": dtype_name(_cache_groups(cache)[0].keys.dtype),
            "exact": cache.exact,
            "seen": seen,
            "prefill": "dense" if cache.prefill.dense else "sparse",
            "chunk_size": cache.prefill.chunk_size,
            **{
                field: [tuple(getattr(group, name) for group in layer.groups) for layer in _layers(cache)]
                for field, name in (("prefix_slots", "prefix_slots"), ("starts", "start"))
            },
            "text": text,
        }
    )


def _groups(header: _Header, cache: PlanCache) -> Iterator[_Group]:
    """The head groups of all layers. Raises ValueError for a header that no cache can have."""
    seen, streaming = header.seen, header.plan.positions == "cache-relative"
    for field in ("prefix_slots", "starts"):
        if len(numbers := getattr(header, field)) != len(cache.layers):
            raise ValueError(f"{field}: of {len(numbers)} layers, the model has {len(cache.layers)}")
    for index, layer in enumerate(_layers(cache)):
        patterns: dict[Pattern, int] = {}
        for pattern in layer.patterns:
            patterns[pattern] = patterns.get(pattern, 0) + 1
        given = {field: getattr(header, field)[index] for field in ("prefix_slots", "starts")}
        for field, numbers in given.items():
            if len(patterns) != len(numbers):
                raise ValueError(f"{field}.{index}: {numbers}, of a layer with {len(patterns)} patterns")
        own = zip(patterns.items(), *given.values(), strict=True)
        for number, ((segment_pattern, heads), prefix_slots, start) in enumerate(own):
            pattern = segment_pattern.widen(layer.decode_window)
            window, most = pattern.window or 0, pattern.top_k
            below_capacity = prefix_slots == 0 and pattern.size(seen) == seen and not (streaming and pattern.sink)
            left = max(start, seen - window)  # columns that have left the ring
            top_k = range(min(left, most), most + 1)  # possible numbers of top-k slots
            if not below_capacity and (pattern.full or prefix_slots - pattern.sink not in top_k):
                raise ValueError(
                    f"prefix_slots.{index}.{number}: {prefix_slots} slots after {seen} tokens under {pattern}"
                )
            # transformers' cache, which a reconstructed cache comes from, lacks the oldest key: no later query sees it
            short = layer.sliding is not None
            last = 0 if below_capacity else max(0, seen - (segment_pattern.window or 0) + short)
            if start > last:
                raise ValueError(f"starts.{index}.{number}: {start} after {seen} tokens under {segment_pattern}")
            recent = seen if below_capacity else min(seen - start, window)
            stored = ("keys", "values") if below_capacity or not most else ("keys", "values", "scores")
            name, slots = f"layers.{index}.{number}.", prefix_slots + recent
            yield _Group(
                name,
                heads,
                cache.heads[index][2],
                pattern,
                not below_capacity,
                prefix_slots,
                start,
                recent,
                slots,
                stored,
            )


def _count_tokens(cache: PlanCache) -> tuple[int, int]:
    """Rows and tokens of a cache; 0 and 0 if it is empty."""
    tokens = cache.get_seq_length()
    return (cache.rows, tokens) if tokens else (0, 0)


def _layers(cache: PlanCache) -> list[PlanLayer]:
    """The layers of a cache. Raises ValueError if it has others, which `save_prefix` refuses."""
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PlanLayer):
            raise ValueError(f"layer {index} of the model is of a kind that prefix files do not hold")
    return cast(list[PlanLayer], cache.layers)


def _cache_groups(cache: PlanCache) -> list[HeadGroup]:
    return [group for layer in cache.layers if isinstance(layer, PlanLayer) for group in layer.groups]


def _tensors(header: _Header, cache: PlanCache) -> dict[str, Tensor]:
    """The parts in use of a cache's buffers."""
    tensors: dict[str, Tensor] = {}
    for group, live in zip(_groups(header, cache), _cache_groups(cache), strict=True):
        tensors |= {group.name + name: getattr(live, name)[:, :, : group.slots] for name in group.stored}
        if live.padding is not None:
            tensors["padding"] = live.padding.tokens.clamp(max=header.seen)  # a row may be padding only so far
    return tensors


# checks


def _check(header: _Header, tensors: dict[str, Tensor], cache: PlanCache, last_id: int | None = None) -> None:
    """Raise ValueError unless the tensors fit a cache with this header.

    cache: of the plan, empty or filled. last_id: the model's largest token id.
    """
    ids = tensors.get("input_ids", torch.empty(0))
    if ids.dim() != 2 or not len(ids) or ids.shape[1] != header.seen:
        raise ValueError(f"input_ids is {list(ids.shape)} and must be rows of {header.seen} tokens")
    expected = _expected_tensors(header, cache, len(ids))
    if "padding" in tensors:
        expected["padding"] = torch.int64, (len(ids),)
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"tensor {name!r} {'is missing' if name in expected else 'does not belong there'}")
    for name, kind in expected.items():
        actual = tensors[name].dtype, tuple(tensors[name].shape)
        if actual != kind:
            given, right = (f"{dtype_name(dtype)} {list(shape)}" for dtype, shape in (actual, kind))
            raise ValueError(f"{name} is {given} and must be {right}")
    _check_range("input_ids", ids, last_id)
    if "padding" in tensors:
        _check_range("padding", tensors["padding"], header.seen)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            finite = tensor.isfinite()
            if not (~tensor.isnan() if name.endswith(".scores") else finite).all():
                raise ValueError(f"{name}: it holds NaN or infinite numbers")
    for group in _groups(header, cache):
        if "scores" in group.stored:
            evicted = header.seen - group.recent - group.pattern.sink - _read_padding(tensors)
            scores = tensors[group.name + "scores"]
            if ((scores == ALWAYS).sum(-1) > 1).any():
                raise ValueError(f"{group.name}scores: several keys of a head are never evicted")
            if ((scores > NONE).sum(-1) > evicted.clamp(min=0)[:, None]).any():
                raise ValueError(f"{group.name}scores: of more top-k keys than have left the window")


def _expected_tensors(header: _Header, cache: PlanCache, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor but the padding. Raises ValueError for a header that no cache can have."""
    dtype = getattr(torch, header.dtype)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"input_ids": (torch.int64, (rows, header.seen))}
    for group in _groups(header, cache):
        dim, layout = group.head_dim, (rows, group.heads, group.slots)
        kinds = {
            "keys": (dtype, (*layout, dim)),
            "values": (dtype, (*layout, dim)),
            "scores": (
                torch.promote_types(dtype, torch.float32),
                (*layout[:2], group.prefix_slots - group.pattern.sink),
            ),
        }
        expected |= {group.name + name: kinds[name] for name in group.stored}
    return expected


def _check_range(name: str, numbers: Tensor, last: int | None) -> None:
    """Raise ValueError for numbers below 0 or above `last`."""
    if numbers.numel() and (int(numbers.min()) < 0 or (last is not None and int(numbers.max()) > last)):
        limits = int(numbers.min()), int(numbers.max())
        raise ValueError(
            f"{name}: numbers from {limits[0]} to {limits[1]}, outside 0{f' to {last}' if last is not None else ' and above'}"
        )


def _read_padding(tensors: dict[str, Tensor]) -> Tensor:
    """Padding of every row in tokens: int64 [rows]."""
    ids = tensors["input_ids"]
    return tensors.get("padding", ids.new_zeros(len(ids)))


# loading


def _fill(cache: PlanCache, header: _Header, tensors: dict[str, Tensor]) -> None:
    """Fill an empty cache with checked tensors."""
    rows = len(tensors["input_ids"])
    tokens = tensors.get("padding")
    padding = None if tokens is None or not tokens.any() else Padding(tokens, int(tokens.max()))
    for layer, (_, heads, dim) in zip(_layers(cache), cache.heads, strict=True):
        none = torch.empty(rows, heads, 0, dim, dtype=getattr(torch, header.dtype)).to(tensors["input_ids"].device)
        layer.fill(none, none, padding)
        layer.seen = header.seen
    for group, live in zip(_groups(header, cache), _cache_groups(cache), strict=True):
        for name in group.stored:
            setattr(live, name, tensors[group.name + name])
        if group.evicts:
            live.below_capacity, live.window, live.prefix_slots = False, group.pattern.window, group.prefix_slots
            live.start = group.start
        live.length, live.visible = header.seen, _visible(header, tensors, group, live.scores)


def _visible(header: _Header, tensors: dict[str, Tensor], group: _Group, scores: Tensor) -> Tensor:
    """Visible slots of a group: bool [rows, heads, slots]. scores: of its top-k keys."""
    seen, sinks = header.seen, group.pattern.sink if group.evicts else 0
    padding, first = _read_padding(tensors)[:, None, None], seen - group.recent
    columns = torch.arange(first, seen, device=scores.device).roll((first - group.start) % max(group.recent, 1))
    evicted = first - padding
    parts = torch.arange(sinks, device=scores.device) < evicted, scores > NONE, columns >= padding
    return torch.cat([part.expand(-1, group.heads, -1) for part in parts], 2)
