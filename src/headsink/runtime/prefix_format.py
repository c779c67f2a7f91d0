"""The format of prefix files (runtime/prefix.py): one safetensors file, whose header determines all tensors in it.

The header holds the plan and a few numbers, which determine the state of every head group and the dtype and shape of every
tensor. A file with other tensors is refused before a kernel reads it. The tensors are the keys and values in use, in their order
in memory (cache/buffers.py), so that sums are equal bit for bit after loading. Which slots are visible follows from the header.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headsink.attention.formats import FORMATS, KVDtype, stored
from headsink.cache.cache import PlanCache
from headsink.cache.layer import PlanLayer
from headsink.errors import HeadsinkError
from headsink.eviction.pattern import Pattern
from headsink.eviction.scorers import ALWAYS, NONE
from headsink.models.devices import dtype_name
from headsink.plan.plan import Plan
from headsink.runtime.apply import Prefill

OLD = ("headsink prefix 1", "headsink prefix 2", "headsink prefix 3", "headsink prefix 4", "headsink prefix 5")

Count = Annotated[int, Field(ge=0, strict=True)]


class Header(BaseModel):
    """Metadata of a prefix file.

    dtype, kv_dtype: of the model, and of cached keys and values. seen: tokens of every row, padding included. prefix_slots: for
    every group of every layer, slots in front of its ring. starts: the column in the first slot of that ring, before it wraps.
    text, exact, prefill, chunk_size: as for `save_prefix` and `new_cache`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headsink prefix 6"] = "headsink prefix 6"
    plan: Plan
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    kv_dtype: KVDtype = "auto"
    exact: Annotated[bool, Field(strict=True)]
    seen: Annotated[int, Field(gt=0, strict=True)]
    prefill: Prefill
    chunk_size: Annotated[int, Field(gt=0, strict=True)] | None
    prefix_slots: tuple[tuple[Count, ...], ...]
    starts: tuple[tuple[Count, ...], ...]
    text: str


class Group(NamedTuple):
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


def read_file(path: str | os.PathLike[str], names: Collection[str] | None = None) -> tuple[Header, dict[str, Tensor]]:
    """Return the header and the tensors with these names, None for all of them. Nothing is checked but the header."""
    try:
        os.stat(path)  # gives a shorter error message than safe_open
        with safe_open(path, "pt") as file:
            header = Header.model_validate_json((file.metadata() or {}).get("headsink", ""))
            wanted = file.keys() if names is None else set(file.keys()).intersection(names)
            return header, {name: file.get_tensor(name) for name in wanted}
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


def groups_of(header: Header, cache: PlanCache) -> Iterator[Group]:
    """The head groups of all layers. Raises ValueError for a header that no cache can have."""
    seen, streaming = header.seen, header.plan.positions == "cache-relative"
    for field in ("prefix_slots", "starts"):
        if len(numbers := getattr(header, field)) != len(cache.layers):
            raise ValueError(f"{field}: of {len(numbers)} layers, the model has {len(cache.layers)}")
    for index, layer in enumerate(layers_of(cache)):
        patterns: dict[Pattern, int] = {}
        for pattern in layer.patterns:
            patterns[pattern] = patterns.get(pattern, 0) + 1
        given = {field: getattr(header, field)[index] for field in ("prefix_slots", "starts")}
        for field, numbers in given.items():
            if len(patterns) != len(numbers):
                raise ValueError(f"{field}.{index}: {numbers}, of a layer with {len(patterns)} patterns")
        own = zip(patterns.items(), *given.values(), strict=True)
        for number, ((segment_pattern, heads), prefix_slots, start) in enumerate(own):
            pattern = segment_pattern.widen(layer.options.decode_window)
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
            yield Group(
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


def layers_of(cache: PlanCache) -> list[PlanLayer]:
    """The layers of a cache. Raises ValueError if it has others, which `save_prefix` refuses."""
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PlanLayer):
            raise ValueError(f"layer {index} of the model is of a kind that prefix files do not hold")
    return cast(list[PlanLayer], cache.layers)


def check_parts(header: Header, tensors: dict[str, Tensor], cache: PlanCache, last_id: int | None = None) -> None:
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
        for rows in FORMATS.get(header.kv_dtype, ()):
            if tensor.dtype == rows.dtype:
                tensor = rows.dequantize(tensor, torch.float32)
        if tensor.is_floating_point():
            finite = tensor.isfinite()
            if not (~tensor.isnan() if name.endswith(".scores") else finite).all():
                raise ValueError(f"{name}: it holds NaN or infinite numbers")
    for group in groups_of(header, cache):
        if "scores" in group.stored:
            evicted = header.seen - group.recent - group.pattern.sink - padding_of(tensors)
            scores = tensors[group.name + "scores"]
            if ((scores == ALWAYS).sum(-1) > 1).any():
                raise ValueError(f"{group.name}scores: several keys of a head are never evicted")
            if ((scores > NONE).sum(-1) > evicted.clamp(min=0)[:, None]).any():
                raise ValueError(f"{group.name}scores: of more top-k keys than have left the window")


def _expected_tensors(header: Header, cache: PlanCache, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor but the padding. Raises ValueError for a header that no cache can have."""
    dtype = getattr(torch, header.dtype)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"input_ids": (torch.int64, (rows, header.seen))}
    for group in groups_of(header, cache):
        dim, layout = group.head_dim, (rows, group.heads, group.slots)
        (key_width, key_dtype), (value_width, value_dtype) = stored(header.kv_dtype, dim, dtype)
        kinds = {
            "keys": (key_dtype, (*layout, key_width)),
            "values": (value_dtype, (*layout, value_width)),
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


def padding_of(tensors: dict[str, Tensor]) -> Tensor:
    """Padding of every row in tokens: int64 [rows]."""
    ids = tensors["input_ids"]
    return tensors.get("padding", ids.new_zeros(len(ids)))
