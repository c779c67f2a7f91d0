"""Which tokens draw attention: sinks by what they say, how stable they are over texts, and which tau finds them."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from headsink.census.head_statistics import TAUS, TOKENS
from headsink.census.results import Census

LEAST_SHARE = 0.0005  # of all attention, from which a token is listed
LEAST_DENSITY = 2.0  # attention per key as a multiple of flat attention, from which keys count as sinks


def drawing_tokens(census: Census, length: int, domain: str | None = None, most: int = 12) -> list[dict[str, Any]]:
    """The tokens that draw most attention over all heads and texts.

    token: what it says. first: it is the first token of its text. share: of all attention, from the keys that are among a head's
    first few. heads: how many have it there. texts: in how many.
    """
    drawn: dict[tuple[int, bool], float] = defaultdict(float)
    heads: dict[tuple[int, bool], set[tuple[int, int]]] = defaultdict(set)
    texts: dict[tuple[int, bool], set[int]] = defaultdict(set)
    total = 0
    for text in census.texts(length, domain):
        ids, top = census.arrays[f"{text}.ids"], census.arrays[f"{text}.{length}.top"].long()
        attention = census.arrays[f"{text}.{length}.attention"].float()
        total += attention.shape[0] * attention.shape[1]
        for layer, head, rank in (top >= 0).nonzero().tolist():
            position = int(top[layer, head, rank])
            key = int(ids[position]), position == 0
            drawn[key] += float(attention[layer, head, position])
            heads[key].add((layer, head))
            texts[key].add(text)
    listed = sorted(drawn.items(), key=lambda item: -item[1])[:most]
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


def secondary_tokens(census: Census, length: int, domain: str | None = None, most: int = 20) -> list[dict[str, Any]]:
    """The tokens that are secondary sinks, by the attention that they draw there.

    occurrences: how often they stand in the texts. taken: the share of those that are a secondary sink of some KV head. heads:
    KV heads that have one of them. texts: in how many. attention: share of the attention of all heads. value, key: norm
    relative to the mean of the head, averaged over the heads that have the token.
    """
    occurrences: Counter[int] = Counter()
    taken: dict[int, set[tuple[int, int]]] = defaultdict(set)
    heads: dict[int, set[tuple[int, int]]] = defaultdict(set)
    texts: dict[int, set[int]] = defaultdict(set)
    attention: dict[int, float] = defaultdict(float)
    norms: dict[int, list[tuple[float, float]]] = defaultdict(list)
    chosen = census.texts(length, domain)
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


def stability(census: Census, length: int, domain: str | None = None) -> dict[str, Any]:
    """Whether a KV head has the same secondary sinks in every text, by what they say.

    heads_with: KV heads with secondary sinks in every text. mean_count: secondary sinks of those, per text. overlap: Jaccard
    overlap of a head's sets of tokens in two texts, over all pairs of texts; chance: of the sets of two heads of different
    layers in two texts. None with one text, or where no head has any.
    """
    chosen = census.texts(length, domain)
    sets: list[list[frozenset[int]]] = []  # [texts][KV heads of all layers]
    counts = []
    for text in chosen:
        ids, secondary = census.arrays[f"{text}.ids"], census.arrays[f"{text}.{length}.secondary"].flatten(0, 1)
        sets.append([frozenset(ids[row[row >= 0].long()].tolist()) for row in secondary])
        counts.append((secondary >= 0).sum(-1))
    count = torch.stack(counts).double()
    having = (count > 0).all(0).nonzero()[:, 0].tolist()
    pairs = list(combinations(range(len(chosen)), 2))
    kv_heads = census.settings["model"]["kv_heads"]
    same = [_jaccard(sets[a][head], sets[b][head]) for a, b in pairs for head in having]
    others = [(head, other) for head in having for other in having if head // kv_heads < other // kv_heads]
    between = [_jaccard(sets[a][head], sets[b][other]) for a, b in pairs for head, other in others]
    return {
        "texts": len(chosen),
        "heads_with": len(having),
        "mean_count": float(count[:, having].mean()) if having else 0.0,
        "overlap": sum(same) / len(same) if same else None,
        "chance": sum(between) / len(between) if between else None,
    }


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)


def tau_evidence(census: Census, length: int, domain: str | None = None) -> list[dict[str, Any]]:
    """For each tau of a grid: what a sink token would be by it, the first tokens left out.

    keys: keys with a value norm below tau of the median, per KV head. attention: their share of it. density: attention per key of
    those between this tau and the one before, as a multiple of what flat attention gives a key; None where there are none.
    """
    keys, attention = (
        census.samples(name, length, domain).mean((0, 1, 2)) for name in ("short_keys", "short_attention")
    )
    more_keys, more = (_steps(found) for found in (keys, attention))
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
    """The largest tau up to which every step adds keys that draw at least twice what flat attention would give them.

    None where no short key draws that much: the model has no secondary sinks there.
    """
    found = None
    for step in tau_evidence(census, length, domain):
        if step["density"] is None:
            continue
        if step["density"] < LEAST_DENSITY:
            break
        found = step["tau"]
    return found
