"""Two census runs side by side: how far the heads moved, and which changed their role."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headsink.census.census import Census
from headsink.census.roles import role
from headsink.errors import HeadsinkError

COMPARED = ("sink", "first", "local", "far", "entropy", "legacy")


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    settings: what differs between the runs. scores: per length, domain and score, the mean of both, the mean absolute
    difference over heads, its largest value and where, and Spearman's rank correlation of the heads. changed: heads with
    another role.
    """

    names: tuple[str, str]
    settings: dict[str, tuple[Any, Any]]
    scores: list[dict[str, Any]]
    changed: list[dict[str, Any]]
    heads: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "runs": list(self.names),
            "settings": {key: list(value) for key, value in self.settings.items()},
            "scores": self.scores,
            "changed": self.changed,
            "heads": self.heads,
        }


def compare(a: str | os.PathLike[str] | Census, b: str | os.PathLike[str] | Census) -> Comparison:
    """Compare two runs on the lengths and domains that they share.

    Raises HeadsinkError if they cannot be compared: models of different shape, other thresholds, nothing in common.
    """
    names = tuple(str(Path(run)) if not isinstance(run, Census) else "census" for run in (a, b))
    one, two = (run if isinstance(run, Census) else Census.load(run) for run in (a, b))
    for field in ("layers", "query_heads"):
        if one.settings["model"][field] != two.settings["model"][field]:
            raise HeadsinkError(
                f"these runs cannot be compared head by head: {field} is {one.settings['model'][field]} in {names[0]} "
                f"and {two.settings['model'][field]} in {names[1]}"
            )
    if one.settings["limits"] != two.settings["limits"]:
        raise HeadsinkError("these runs cannot be compared: they count different tokens as sinks or as near (`limits`)")
    lengths = [n for n in one.lengths if n in two.lengths]
    domains = [d for d in one.domains if d in two.domains]
    if not lengths or not domains:
        what = "length" if not lengths else "kind of text"
        raise HeadsinkError(f"these runs cannot be compared: they have no {what} in common")
    scores, changed = [], []
    for length in lengths:
        for domain in domains:
            columns = {
                name: (one.score(name, length, domain), two.score(name, length, domain))
                for name in (*COMPARED, "far_peak")
            }
            scores += [
                {"length": length, "domain": domain, "score": name, **_difference(*columns[name])} for name in COMPARED
            ]
            for layer, head in torch.cartesian_prod(*(torch.arange(n) for n in columns["sink"][0].shape)).tolist():
                roles = [
                    role(*(float(columns[name][run][layer, head]) for name in ("sink", "local", "far", "far_peak")))
                    for run in (0, 1)
                ]
                if roles[0] != roles[1]:
                    where = {"length": length, "domain": domain, "layer": layer, "head": head}
                    changed.append({**where, "before": roles[0], "after": roles[1]})
    shape = one.settings["model"]
    differing = {
        key: (one.settings[key], two.settings[key])
        for key in ("headsink", "model", "dtype", "device", "lengths", "texts", "seed", "versions")
        if one.settings[key] != two.settings[key]
    }
    heads = len(lengths) * len(domains) * shape["layers"] * shape["query_heads"]
    return Comparison((names[0], names[1]), differing, scores, changed, heads)


def _difference(a: Tensor, b: Tensor) -> dict[str, Any]:
    moved = (b - a).abs()
    place = int(moved.argmax())
    return {
        "mean_a": float(a.mean()),
        "mean_b": float(b.mean()),
        "mean_difference": float(moved.mean()),
        "largest_difference": float(moved.max()),
        "largest_at": [place // a.shape[1], place % a.shape[1]],
        "rank_correlation": rank_correlation(a.flatten(), b.flatten()),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rho, ties at their mean rank. None if one side is constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    rho = torch.corrcoef(ranks)[0, 1]
    return float(rho) if torch.isfinite(rho) else None


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()
