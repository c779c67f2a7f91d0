"""Compare census runs: how much scores of heads change, which changes exceed chance, and which heads change their role.

A run is compared as a whole or in part: `runs/a@512`, `runs/a:code`, `runs/a@512:code` name a length and a kind of text, so two
lengths or two kinds of text of one run can be compared as well.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headsink.census.options import run_parts
from headsink.census.results import Census
from headsink.errors import HeadsinkError
from headsink.utils.format import ranges
from headsink.utils.statistics import Interval, difference, rank_correlation

COMPARED = ("sink", "first", "local", "far", "entropy", "legacy", "output")
SETTINGS = ("headsink", "model", "dtype", "device", "lengths", "texts", "queries", "seed", "versions")
MOST_MOVED = 10


@dataclass(frozen=True)
class Run:
    """A census, or its part with one length or one kind of text."""

    name: str
    census: Census
    length: int | None = None
    domain: str | None = None


@dataclass(frozen=True)
class View:
    """A score at a length on a kind of text, in the first run and in another (`run`).

    layers: numbers of the layers. before, after: float64 [layers, query heads]. change: mean change with the half width of its
    95 % interval over texts, NaN if a run has only one text. paired: both runs used the same texts.
    """

    run: str
    lengths: tuple[int, int]
    domains: tuple[str | None, str | None]
    score: str
    layers: list[int]
    before: Tensor
    after: Tensor
    change: Interval
    paired: bool

    def to_dict(self) -> dict[str, Any]:
        change = self.change.mean.abs()
        beyond = change > self.change.half  # False where the half width is NaN
        order = change.flatten().argsort(descending=True)[:MOST_MOVED].tolist()
        places = [divmod(index, change.shape[1]) for index in order]
        return {
            "run": self.run,
            "lengths": list(self.lengths),
            "domains": [domain or "all texts" for domain in self.domains],
            "score": self.score,
            "mean_a": float(self.before.mean()),
            "mean_b": float(self.after.mean()),
            "mean_difference": float(change.mean()),
            "largest_difference": float(change.max()),
            "largest_at": [self.layers[places[0][0]], places[0][1]],
            "rank_correlation": rank_correlation(self.before.flatten(), self.after.flatten()),
            "paired": self.paired,
            "beyond_chance": None if self.change.half.isnan().all() else float(beyond.double().mean()),
            "most_moved": [
                {
                    "layer": self.layers[row],
                    "head": head,
                    "change": float(self.change.mean[row, head]),
                    "half": _number(self.change.half[row, head]),
                }
                for row, head in places
            ],
        }


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    names: the runs. settings: the settings that differ, with a value for each run. views: the scores, for each run after the
    first. changed: heads with another role. heads: number of roles compared (per run, length, kind of text and head).
    """

    names: tuple[str, ...]
    settings: dict[str, tuple[Any, ...]]
    views: list[View]
    changed: list[dict[str, Any]]
    heads: int

    def __repr__(self) -> str:
        return f"Comparison of {' and '.join(self.names)}: {len(self.changed)} of {self.heads} roles changed"

    def to_dict(self) -> dict[str, Any]:
        return {
            "runs": list(self.names),
            "settings": {key: list(value) for key, value in self.settings.items()},
            "scores": [view.to_dict() for view in self.views],
            "changed": self.changed,
            "heads": self.heads,
        }


def compare(*runs: str | os.PathLike[str] | Census) -> Comparison:
    """Compare two or more runs, each with the first, on the lengths and kinds of text that they share, and on all texts together.

    Raises HeadsinkError if they cannot be compared: models of different shape, other thresholds, no length or kind in common.
    """
    if len(runs) < 2:
        raise HeadsinkError("compare: give two runs or more")
    first, *others = [_open(run, number) for number, run in enumerate(runs)]
    views: list[View] = []
    changed: list[dict[str, Any]] = []
    heads = 0
    for other in others:
        _check(first, other)
        for lengths, domains in _pairs(first, other):
            sides = [(first.census, lengths[0], domains[0]), (other.census, lengths[1], domains[1])]
            paired = _same_texts(*sides)
            for score in COMPARED:
                one, two = (census.samples(score, length, domain) for census, length, domain in sides)
                change = difference(one, two, paired)
                layers, means = first.census.layers, (one.mean(0), two.mean(0))
                views.append(View(other.name, lengths, domains, score, layers, *means, change, paired))
            before, after = (census.roles(length, domain) for census, length, domain in sides)
            for layer, old, new in zip(first.census.layers, before, after, strict=True):
                heads += len(old)
                for head, (was, now) in enumerate(zip(old, new, strict=True)):
                    if was != now:
                        where = {
                            "run": other.name,
                            "lengths": list(lengths),
                            "domains": [d or "all texts" for d in domains],
                        }
                        changed.append({**where, "layer": layer, "head": head, "before": was, "after": now})
    all_runs = [first, *others]
    differing = {
        key: tuple(run.census.settings[key] for run in all_runs)
        for key in SETTINGS
        if any(run.census.settings[key] != first.census.settings[key] for run in others)
    }
    return Comparison(tuple(run.name for run in all_runs), differing, views, changed, heads)


def _open(run: str | os.PathLike[str] | Census, number: int) -> Run:
    if isinstance(run, Census):
        return Run(f"{run.settings['model']['name']} ({number + 1})", run)
    name = str(run)
    folder, length, domain = run_parts(name)
    census = Census.load(folder)
    if (length or domain) and not census.has(length or census.lengths[-1], domain):
        raise HeadsinkError(
            f"{name}: the run has lengths {', '.join(map(str, census.lengths))} and texts {', '.join(census.domains)}"
        )
    return Run(name, census, length, domain)


def _check(one: Run, two: Run) -> None:
    for field in ("layers", "query_heads"):
        a, b = (run.census.settings["model"][field] for run in (one, two))
        if a != b:
            raise HeadsinkError(
                f"these runs cannot be compared head by head: {field} is {a} in {one.name} and {b} in {two.name}"
            )
    if one.census.layers != two.census.layers:
        a, b = (ranges(run.census.layers) for run in (one, two))
        raise HeadsinkError(
            f"these runs cannot be compared head by head: the layers with attention are {a} in {one.name} and {b} in {two.name}"
        )
    if one.census.settings["limits"] != two.census.settings["limits"]:
        raise HeadsinkError(
            f"{one.name} and {two.name} cannot be compared: their thresholds for sinks and local keys differ (`limits`)"
        )


def _pairs(one: Run, two: Run) -> list[tuple[tuple[int, int], tuple[str | None, str | None]]]:
    """The lengths and kinds of text that both runs have, or those that a run names."""
    if one.length or two.length:
        lengths = [(one.length or two.length, two.length or one.length)]
    else:
        lengths = [(n, n) for n in one.census.lengths if n in two.census.lengths]
    if one.domain or two.domain:
        domains: list[tuple[str | None, str | None]] = [(one.domain or two.domain, two.domain or one.domain)]
    else:
        domains = [(d, d) for d in one.census.domains if d in two.census.domains]
        if len(domains) > 1 and one.census.domains == two.census.domains:
            domains.insert(0, (None, None))
    pairs = [
        ((a, b), (c, d))
        for a, b in lengths
        for c, d in domains
        if a and b and one.census.has(a, c) and two.census.has(b, d)
    ]
    if not pairs:
        what = "kind of text" if lengths else "length"
        name = "both, as in " + " ".join(_with_part(run, not lengths, not domains) for run in (one, two))
        raise HeadsinkError(f"{one.name} and {two.name} cannot be compared: they have no {what} in common; name {name}")
    return pairs


def _with_part(run: Run, length: bool, domain: bool) -> str:
    """The name of a run with its longest length, its first kind of text, or both."""
    folder, own_length, own_domain = run_parts(run.name)
    longest = own_length or (run.census.lengths[-1] if length else None)
    kind = own_domain or (run.census.domains[0] if domain else None)
    return f"{folder}{f'@{longest}' if longest else ''}{f':{kind}' if kind else ''}"


def _same_texts(one: tuple[Census, int, str | None], two: tuple[Census, int, str | None]) -> bool:
    """Whether both runs used the same tokens, text by text."""
    ids = [
        [census.arrays[f"{text}.ids"] for text in census.texts(length, domain)] for census, length, domain in (one, two)
    ]
    shared = min(one[1], two[1])
    return len(ids[0]) == len(ids[1]) and all(torch.equal(a[:shared], b[:shared]) for a, b in zip(*ids, strict=True))


def _number(value: Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None
