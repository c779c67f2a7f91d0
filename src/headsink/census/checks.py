"""Checks of a census that was read from a folder: its settings, vocabulary and arrays must fit together.

The folder may be damaged or made by somebody else. A census that passes can be shown, compared and drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from headsink.census.head_statistics import KEPT, SCORES, TAUS, TOKENS, distances, windows
from headsink.data.domains import DOMAIN_RULE, is_domain
from headsink.errors import HeadsinkError
from headsink.utils.files import check_text

SCHEMA = 3
TOP_KEYS = 8
SEEDS = (-(2**63), 2**64)  # range of torch seeds

Shape = tuple[int | None, ...]  # None: one or more


def _domain(name: str) -> str:
    if not is_domain(name):
        raise ValueError(f"{name!r} {DOMAIN_RULE}")
    return name


Count = Annotated[int, Field(gt=0)]
Domain = Annotated[str, AfterValidator(_domain)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Model(_Part):
    name: str
    source: str
    architecture: str
    layers: Count
    query_heads: Count
    kv_heads: Count
    head_dim: Count
    weights: str
    sliding: list[Count | None]
    numbers: list[Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads cannot share {self.kv_heads} KV heads")
        if len(self.sliding) != self.layers:
            raise ValueError(f"sliding: {len(self.sliding)} given for {self.layers} layers")
        if self.numbers is not None and len(self.numbers) != self.layers:
            raise ValueError(f"numbers: {len(self.numbers)} given for {self.layers} layers")
        if any(a >= b for a, b in pairwise(self.numbers or ())):
            raise ValueError("numbers: they must increase")
        return self


class _Text(_Part):
    domain: Domain
    number: Annotated[int, Field(ge=0)]
    tokens: Count
    sha256: str


class _Limits(_Part):
    first: Annotated[int, Field(ge=0)]
    secondary: Annotated[int, Field(ge=0)]
    tau: Annotated[float, Field(allow_inf_nan=False)]
    window: Annotated[int, Field(ge=0)]


class _Settings(_Part):
    schema_: Annotated[Literal[3], Field(alias="schema")]
    headsink: str
    model: _Model
    dtype: str
    device: str
    lengths: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]
    texts: Annotated[list[_Text], Field(min_length=1)]
    texts_per_domain: int
    own_texts: dict[Domain, list[str]] | None
    limits: _Limits
    queries: Annotated[int, Field(ge=2)]
    seed: Annotated[int, Field(ge=SEEDS[0], lt=SEEDS[1])]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if any(a >= b for a, b in pairwise(self.lengths)):
            raise ValueError("lengths: they must increase")
        if min(text.tokens for text in self.texts) < self.lengths[0]:
            raise ValueError("texts: one of them is shorter than the shortest length")
        if max(text.tokens for text in self.texts) != self.lengths[-1]:
            raise ValueError("texts: the longest must have as many tokens as the longest length")
        return self


def check(settings: Any, vocabulary: Any, arrays: Mapping[str, Tensor]) -> str | None:
    """The first error in a census, None if there is none. settings, vocabulary: contents of the JSON files."""
    try:
        check_text(_strings(settings), "census.json")
        check_text(_strings(vocabulary), "tokens.json")
        _Settings.model_validate(settings)
    except HeadsinkError as error:
        return str(error)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"census.json: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
    valid = isinstance(vocabulary, dict) and all(
        key.isdecimal() and isinstance(vocabulary[key], str) for key in vocabulary
    )
    if not valid:
        return "tokens.json: it must map token ids to their text"
    known = {int(token) for token in vocabulary}
    of_texts: dict[str, dict[str, Tensor]] = {str(number): {} for number in range(len(settings["texts"]))}
    for name, array in arrays.items():
        number, _, rest = name.partition(".")
        if number not in of_texts:
            return f"arrays.safetensors: {name} belongs to no text"
        of_texts[number][rest] = array
    for number, own in of_texts.items():
        if problem := misfit(settings, int(number), own):
            return f"arrays.safetensors: {number}.{problem}"
        if not known.issuperset(own["ids"].tolist()):
            return f"tokens.json: a token of text {number} is missing"
    return None


def misfit(settings: Mapping[str, Any], text: int, arrays: Mapping[str, Tensor]) -> str | None:
    """The first error in the arrays of one text (`Census`, names without the text's number), None if there is none."""
    expected = _expected(settings, text)
    for name in expected.keys() ^ arrays.keys():
        return f"{name} is {'missing' if name in expected else 'unknown'}"
    for name, (kind, shape, range_) in expected.items():
        array = arrays[name]
        fits = len(shape) == array.dim() and all(
            size == wanted if wanted is not None else size > 0 for size, wanted in zip(array.shape, shape, strict=True)
        )
        if array.dtype != kind or not fits:
            return f"{name} is {array.dtype} {list(array.shape)} and does not fit the settings"
        if range_ is not None and not (range_[0] <= int(array.min()) and int(array.max()) < range_[1]):
            return f"{name} has a number outside {range_[0]} to {range_[1] - 1}"
    return None


def _expected(settings: Mapping[str, Any], text: int) -> dict[str, tuple[torch.dtype, Shape, tuple[int, int] | None]]:
    """Expected arrays of a text: name -> dtype, shape, and range of integers."""
    model, tokens = settings["model"], settings["texts"][text]["tokens"]
    layers, heads, kv_heads = (model[name] for name in ("layers", "query_heads", "kv_heads"))
    expected: dict[str, tuple[torch.dtype, Shape, tuple[int, int] | None]] = {
        "ids": (torch.int32, (tokens,), (0, 2**31)),
    }
    for n in (n for n in settings["lengths"] if n <= tokens):
        by_head: dict[str, tuple[torch.dtype, Shape]] = {
            "scores": (torch.float64, (heads, len(SCORES))),
            "uniform": (torch.float64, (heads, len(SCORES))),
            "profile": (torch.float32, (heads, len(distances(n)))),
            "errors": (torch.float32, (heads, len(KEPT), len(windows(n)))),
            "group_errors": (torch.float32, (kv_heads, len(KEPT), len(windows(n)))),
            "tokens": (torch.float64, (kv_heads, len(TOKENS))),
            "secondary": (torch.int32, (kv_heads, None)),
            "short_keys": (torch.float32, (kv_heads, len(TAUS))),
            "short_attention": (torch.float32, (kv_heads, len(TAUS))),
            "top": (torch.int32, (heads, TOP_KEYS)),
            "attention": (torch.float16, (heads, n)),
        }
        for name, (kind, shape) in by_head.items():
            expected[f"{n}.{name}"] = kind, (layers, *shape), (-1, n) if kind is torch.int32 else None
    return expected


def _strings(value: Any) -> str:
    """All strings in a JSON value, concatenated."""
    if isinstance(value, dict):
        return "".join(key + _strings(of) for key, of in value.items())
    if isinstance(value, list):
        return "".join(map(_strings, value))
    return value if isinstance(value, str) else ""
