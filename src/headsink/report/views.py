"""The numbers of every head that a report shows, and their format in the page.

A view is one length on one kind of text. The page contains the arrays as one compressed binary block in base64, which the browser
unpacks without a library. It has a tenth of the size of JSON.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from headsink.census.first_layer import RULES, conditional
from headsink.census.head_statistics import KEPT, LEAST_WINDOW, SCORES, TOKENS, Thresholds, windows
from headsink.census.roles import ROLES
from headsink.utils.statistics import interval

if TYPE_CHECKING:
    from headsink.census.results import Census


POOLED = "all texts"
TOKEN_VIEW = 2048  # shaded tokens of a text at most
SHADES = 2**22  # shades of all heads and texts at most, one byte each, to keep the page small
FAINTEST = 2.0**-20  # attention below this is shown as 0
STEPS = 254  # steps of the logarithmic scale of attention from FAINTEST to 1: 5.6 % each
TYPES = {torch.float32: "f4", torch.int32: "i4", torch.uint8: "u1"}


@dataclass(frozen=True)
class Statistic:
    """One number for every head, and the colour scale of its map.

    low, high: ends of the scale; None for an end that depends on the length.
    """

    title: str
    scale: Literal["linear", "log", "symlog"] = "linear"
    low: float = 0
    high: float | None = 1


STATISTICS = {
    "sink": Statistic("attention to sink tokens"),
    "first": Statistic("attention to the first token"),
    "local": Statistic("attention to the last keys"),
    "far": Statistic("attention to far keys"),
    "far_peak": Statistic("attention to the strongest far key"),
    "learned": Statistic("attention to the learned sink logit"),
    "entropy": Statistic("entropy, nats", high=None),
    "effective": Statistic("effective number of keys", "log", 1, None),
    "distance": Statistic("median distance of the attention, keys", "log", 1, None),
    "output": Statistic("output norm relative to the layer's"),
    "window": Statistic("window needed with secondary sinks", "symlog", 0, None),
    "window_first": Statistic("window needed with initial tokens only", "symlog", 0, None),
    "error_secondary": Statistic("error of the near window with secondary sinks", "log", 1e-4, 1),
    "error_first": Statistic("error of the near window with initial tokens only", "log", 1e-4, 1),
    "secondary": Statistic("secondary sinks of its KV head", "symlog", 0, None),
    "agreement": Statistic("share of texts in which it has this role"),
    "legacy": Statistic("legacy score (row 0 counted)"),
}


@dataclass(frozen=True)
class View:
    """Every head at one length on one kind of text.

    value, half, uniform: float64 [STATISTICS, layers, heads]; half is the half width of the 95 % interval over texts, uniform
    the value under flat attention, NaN where there is none. roles: int64 [layers, heads]. profile: [layers, heads, distances].
    errors: [layers, heads, KEPT, windows]. pairs: [layers a, layers b], see `first_layer.conditional`. rate: share of sinks
    [layers].
    """

    value: Tensor
    half: Tensor
    uniform: Tensor
    roles: Tensor
    profile: Tensor
    errors: Tensor
    pairs: Tensor
    rate: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """A row for each head, for the charts."""
        heads = []
        for layer, names in enumerate(self.roles.tolist()):
            for head, role in enumerate(names):
                values = {name: number(self.value[n, layer, head]) for n, name in enumerate(STATISTICS)}
                heads.append({"layer": layer, "head": head, "role": ROLES[role]} | values)
        return heads


def near_window(census: Census, length: int) -> int:
    """The largest measured window that is near at this length."""
    near = max(LEAST_WINDOW, Thresholds(**census.settings["limits"]).at(length).window)
    return max(window for window in windows(length) if window <= near)


def view(census: Census, length: int, domain: str | None) -> View:
    scores = interval(census.samples("scores", length, domain))
    uniform = census.score("uniform", length, domain)
    errors = census.samples("errors", length, domain)
    near = interval(errors[..., windows(length).index(near_window(census, length))])
    secondary = interval(census.samples("tokens", length, domain)[..., list(TOKENS).index("secondary_count")])
    group = scores.mean.shape[1] // secondary.mean.shape[1]
    none = torch.full(scores.mean.shape[:2], torch.nan, dtype=torch.float64)

    values = {name: scores.mean[..., n] for n, name in enumerate(SCORES)}
    halves = {name: scores.half[..., n] for n, name in enumerate(SCORES)}
    values["distance"] = census.distance(0.5, length, domain)
    values["agreement"] = census.role_agreement(length, domain)
    for name, kept in (("window", "secondary"), ("window_first", "first")):
        values[name] = census.required_window(length, domain, kept=kept)
    for n, kept in enumerate(KEPT):
        values[f"error_{kept}"], halves[f"error_{kept}"] = near.mean[..., n], near.half[..., n]
    values["secondary"], halves["secondary"] = (part.repeat_interleave(group, 1) for part in secondary)
    score, least = RULES["sink tokens"]
    sinks = values[score] >= least
    flat = {name: uniform[..., n] for n, name in enumerate(SCORES)}
    return View(
        value=torch.stack([values[name] for name in STATISTICS]),
        half=torch.stack([halves.get(name, none) for name in STATISTICS]),
        uniform=torch.stack([flat.get(name, none) for name in STATISTICS]),
        roles=census.mean_roles(length, domain),
        profile=census.score("profile", length, domain),
        errors=errors.mean(0),
        pairs=conditional(sinks),
        rate=sinks.double().mean(1),
    )


def top_keys(census: Census, text: int, length: int) -> dict[str, Tensor]:
    """The keys with most attention of every query head on a text: positions, attention, and whether they are secondary sinks."""
    top = census.arrays[f"{text}.{length}.top"]
    attention = census.arrays[f"{text}.{length}.attention"].float().gather(-1, top.clamp(min=0).long())
    secondary = census.arrays[f"{text}.{length}.secondary"]
    secondary = secondary.repeat_interleave(top.shape[1] // secondary.shape[1], 1)
    sink = (top[..., None] == secondary[:, :, None]).any(-1) & (top >= 0)
    return {"top": top, "drawn": attention, "sink": sink.to(torch.uint8)}


def token_views(census: Census) -> dict[int, tuple[int, int]]:
    """The texts of the token view, one of each kind: text -> length of its statistics and number of shown tokens."""
    model = census.settings["model"]
    room = max(16, SHADES // (model["layers"] * model["query_heads"] * len(census.domains)))
    shown = {}
    for domain in census.domains:
        lengths = [n for n in census.lengths if census.has(n, domain)]
        length = max([n for n in lengths if n <= TOKEN_VIEW] or lengths[:1])
        shown[census.texts(length, domain)[0]] = length, min(length, TOKEN_VIEW, room)
    return shown


def one_byte(attention: Tensor) -> Tensor:
    """Attention on a logarithmic scale: uint8, 0 for less than FAINTEST, 1 + STEPS for 1."""
    shade = 1 + STEPS * (1 - attention.float().clamp(min=FAINTEST / 2).log2() / torch.tensor(FAINTEST).log2())
    return torch.where(attention < FAINTEST, 0, shade.round().clamp(1, 1 + STEPS)).to(torch.uint8)


def number(value: Tensor) -> float | None:
    """A number for JSON and charts: None in place of NaN and infinity."""
    return float(value) if torch.isfinite(value) else None


def three_figures(array: Tensor) -> Tensor:
    """float32 with 11 bits of precision, enough for display, which compresses to half the size."""
    return ((array.float().contiguous().view(torch.int32) + 0x800) & -0x1000).view(torch.float32)


def pack(arrays: Mapping[str, Tensor], **more: Any) -> str:
    """Pack arrays and JSON values (`more`) as text: length of the header, header, numbers; gzip; base64."""
    parts, offset, entries = [], 0, {}
    for name, array in arrays.items():
        if array.is_floating_point():
            array = three_figures(array)
        elif array.dtype != torch.uint8:
            array = array.int()
        raw = array.contiguous().numpy().tobytes()
        entries[name] = [TYPES[array.dtype], offset, list(array.shape)]
        parts.append(raw + b"\0" * (-len(raw) % 4))
        offset += len(parts[-1])
    header = json.dumps({"arrays": entries} | more, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 4)  # typed arrays must begin at multiples of 4
    whole = len(header).to_bytes(4, "little") + header + b"".join(parts)
    return base64.b64encode(gzip.compress(whole, 6, mtime=0)).decode()
