"""Tokens that receive most attention: sinks by their text, their stability over texts, and the tau that identifies them."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from headsink.census.head_statistics import TAUS, TOKENS
from headsink.census.results import Census

LEAST_SHARE = 0.0005  # least share of all attention of a listed token
LEAST_DENSITY = 2.0  # least attention per key of sinks, as a multiple of flat attention


def drawing_tokens(census: Census, length: int, most: int = 12) -> list[dict[str, Any]]:
    """The tokens that receive most attention over all heads and texts.

    token: its text. first: whether it is the first token of a text. share: of all attention, counting the top keys of every head.
    heads: number of heads with the token among their top keys. texts: number of texts in which this occurs.
    """
    received: dict[tuple[int, bool], float] = defaultdict(float)
    heads: dict[tuple[int, bool], set[tuple[int, int]]] = defaultdict(set)
    texts: dict[tuple[int, bool], set[int]] = defaultdict(set)
    total = 0
    for text in census.texts(length):
        ids, top = census.arrays[f"{text}.ids"], census.arrays[f"{text}.{length}.top"].long()
        attention = census.arrays[f"{text}.{length}.attention"].float()
        total += attention.shape[0] * attention.shape[1]
        for layer, head, rank in (top >= 0).nonzero().tolist():
            position = int(top[layer, head, rank])
            key = int(ids[position]), position == 0
            received[key] += float(attention[layer, head, position])
            heads[key].add((layer, head))
            texts[key].add(text)
    listed = sorted(received.items(), key=lambda item: -item[1])[:most]
    return [
        {
            "token": census.vocabulary[key[0]],
            "first": key[1],
            "share": mass / total,
            "heads": len(heads[key]),
            "texts": len(texts[key]),
        }
        for key, mass in listed
        if mass / total >= LEAST_SHARE
    ]


def secondary_tokens(census: Census, length: int, most: int = 20) -> list[dict[str, Any]]:
    """The tokens that are secondary sinks, by the attention that they receive as such.

    occurrences: number in the texts. taken: share of the occurrences that are a secondary sink of some KV head. heads: number of
    KV heads with such a sink. texts: number of texts with one. attention: share of the attention of all heads. value, key: norm
    relative to the head's mean, averaged over these heads.
    """
    occurrences: Counter[int] = Counter()
    taken: dict[int, set[tuple[int, int]]] = defaultdict(set)
    heads: dict[int, set[tuple[int, int]]] = defaultdict(set)
    texts: dict[int, set[int]] = defaultdict(set)
    attention: dict[int, float] = defaultdict(float)
    norms: dict[int, list[tuple[float, float]]] = defaultdict(list)
    chosen = census.texts(length)
    value_column, key_column = (list(TOKENS).index(name) for name in ("secondary_value", "secondary_key"))
    for text in chosen:
        ids = census.arrays[f"{text}.ids"][:length].tolist()
        occurrences.update(ids)
        secondary = census.arrays[f"{text}.{length}.secondary"].long()
        mass = census.arrays[f"{text}.{length}.attention"].float()
        by_group = mass.view(*secondary.shape[:2], -1, mass.shape[2]).mean(2)
        tokens = census.arrays[f"{text}.{length}.tokens"]
        for layer, head, rank in (secondary >= 0).nonzero().tolist():
            position = int(secondary[layer, head, rank])
            token = ids[position]
            taken[token].add((text, position))
            heads[token].add((layer, head))
            texts[token].add(text)
            attention[token] += float(by_group[layer, head, position]) / (
                len(chosen) * by_group.shape[0] * by_group.shape[1]
            )
            norms[token].append((float(tokens[layer, head, value_column]), float(tokens[layer, head, key_column])))
    return [
        {
            "token": census.vocabulary[token],
            "occurrences": occurrences[token],
            "taken": len(taken[token]) / occurrences[token],
            "heads": len(heads[token]),
            "texts": len(texts[token]),
            "attention": attention[token],
            "value": sum(value for value, _ in norms[token]) / len(norms[token]),
            "key": sum(key for _, key in norms[token]) / len(norms[token]),
        }
        for token in sorted(attention, key=lambda token: -attention[token])[:most]
    ]


def stability(census: Census, length: int) -> dict[str, Any]:
    """Whether a KV head has the same secondary sinks, by their text, in every text.

    heads_with: number of KV heads with secondary sinks in every text. mean_count: their secondary sinks per text. overlap: mean
    Jaccard index of a head's sets of tokens in two texts. chance: the same for two heads of different layers. Both are None with
    one text, or if no head has secondary sinks.
    """
    chosen = census.texts(length)
    sets: list[list[frozenset[int]]] = []  # [texts][KV heads of all layers]
    counts = []
    for text in chosen:
        ids, secondary = census.arrays[f"{text}.ids"], census.arrays[f"{text}.{length}.secondary"].flatten(0, 1)
        sets.append([frozenset(ids[row[row >= 0].long()].tolist()) for row in secondary])
        counts.append((secondary >= 0).sum(-1))
    count = torch.stack(counts).double()
    with_sinks = (count > 0).all(0).nonzero()[:, 0].tolist()
    pairs = list(combinations(range(len(chosen)), 2))
    kv_heads = census.settings["model"]["kv_heads"]
    same = [_jaccard(sets[a][head], sets[b][head]) for a, b in pairs for head in with_sinks]
    others = [(head, other) for head in with_sinks for other in with_sinks if head // kv_heads < other // kv_heads]
    between = [_jaccard(sets[a][head], sets[b][other]) for a, b in pairs for head, other in others]
    return {
        "texts": len(chosen),
        "heads_with": len(with_sinks),
        "mean_count": float(count[:, with_sinks].mean()) if with_sinks else 0.0,
        "overlap": sum(same) / len(same) if same else None,
        "chance": sum(between) / len(between) if between else None,
    }


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)


def tau_evidence(census: Census, length: int, domain: str | None = None) -> list[dict[str, Any]]:
    """For each tau of a grid, the keys that would be secondary sinks and their attention, without initial tokens.

    keys: number of keys with a value norm below tau times the median, per KV head. attention: their share. density: attention per
    key of those between this tau and the previous one, as a multiple of flat attention; None if there are none.
    """
    keys, attention = (
        census.samples(name, length, domain).mean((0, 1, 2)) for name in ("short_keys", "short_attention")
    )
    more_keys, more = (_steps(cumulative) for cumulative in (keys, attention))
    return [
        {
            "tau": tau,
            "keys": float(keys[n]),
            "attention": float(attention[n]),
            "density": float(more[n] / more_keys[n] * length) if more_keys[n] > 0 else None,
        }
        for n, tau in enumerate(TAUS)
    ]


def _steps(cumulative: Tensor) -> Tensor:
    return cumulative.diff(prepend=torch.zeros(1, dtype=cumulative.dtype))


def suggested_tau(census: Census, length: int, domain: str | None = None) -> float | None:
    """The largest tau up to which every step adds keys with at least twice the attention per key of flat attention.

    None if no key with a small value norm has that much: the model has no secondary sinks at this length.
    """
    tau = None
    for step in tau_evidence(census, length, domain):
        if step["density"] is None:
            continue
        if step["density"] < LEAST_DENSITY:
            break
        tau = step["tau"]
    return tau
