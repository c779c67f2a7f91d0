"""The numbers of every head that a report shows: a view is one length on one kind of text."""

from __future__ import annotations

from collections.abc import Sequence
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
TOKEN_VIEW = 8192  # tokens of a mapped and shaded text at most
SHADES = 2**20  # shades of all heads and texts at most, one byte each, to keep the page under 5 MB
MANY_HEADS = 400  # above which the scores take so much of the page that texts, maps and top keys get less


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

    def rows(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        """A row for each head, for the charts. layers: `Census.layers`."""
        heads = []
        for row, names in enumerate(self.roles.tolist()):
            for head, role in enumerate(names):
                values = {name: number(self.value[n, row, head]) for n, name in enumerate(STATISTICS)}
                heads.append({"layer": layers[row], "head": head, "role": ROLES[role]} | values)
        return heads


def statistics(census: Census) -> list[str]:
    """Names of the statistics that apply to the model: `learned` only with learned sink logits."""
    learned = float(census.score("learned", census.lengths[-1]).max()) > 0
    return [name for name in STATISTICS if name != "learned" or learned]


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
    """The keys with most attention of every query head on a text: positions, attention, and whether they are secondary sinks.

    Of a model with many heads, fewer of them.
    """
    top = census.arrays[f"{text}.{length}.top"]
    top = top[..., : max(2, int(share_of_room(census) * top.shape[-1]))]
    attention = census.arrays[f"{text}.{length}.attention"].float().gather(-1, top.clamp(min=0).long())
    secondary = census.arrays[f"{text}.{length}.secondary"]
    secondary = secondary.repeat_interleave(top.shape[1] // secondary.shape[1], 1)
    sink = (top[..., None] == secondary[:, :, None]).any(-1) & (top >= 0)
    return {"top": top, "drawn": attention, "sink": sink.to(torch.uint8)}


def share_of_room(census: Census) -> float:
    """The share of the usual room that shades, attention maps and top keys get in a report, so that it stays under 5 MB."""
    model = census.settings["model"]
    return min(1.0, MANY_HEADS / (model["layers"] * model["query_heads"]))


def token_views(census: Census) -> dict[int, tuple[int, int]]:
    """The texts of the token view, one of each kind: text -> length of its statistics and number of shown tokens."""
    model = census.settings["model"]
    room = max(
        16, int(share_of_room(census) * SHADES) // (model["layers"] * model["query_heads"] * len(census.domains))
    )
    shown = {}
    for domain in census.domains:
        lengths = [n for n in census.lengths if census.has(n, domain)]
        length = max([n for n in lengths if n <= TOKEN_VIEW] or lengths[:1])
        shown[census.texts(length, domain)[0]] = length, min(length, TOKEN_VIEW, room)
    return shown


def number(value: Tensor) -> float | None:
    """A number for JSON and charts: None in place of NaN and infinity."""
    return float(value) if torch.isfinite(value) else None
