"""Do code, maths, chat and questions have attention patterns of their own? By the census, and by plans.

Census: texts of every kind, and what differs between two kinds beside what differs between texts of one kind. Plans: one
calibrated on each kind, and the default one, twice with documents of different seeds, all at one budget; each is run over
held-out documents of every kind. A kind's own plan should be better there than another's by more than its two differ.

`run` returns a dictionary of what JSON has:

    context, budget, families, documents, texts, seed, seeds, model, dtype, device, versions, machine, threads
    overlap   of the texts and of the documents of each family, how much of one is found in another, [mean, most]
    census    of full layers, at `context` tokens
      families   {family: {roles: {role: share of query heads}, scores: {score: number}, keys: {figure: number}}}
                 a number is {mean, half}: over texts, with the half width of its 95 % interval; keys, of KV heads within 1 % of
                 the output: window (median), kept (mean share of all keys, window and sinks), all (share that needs every key),
                 secondary (secondary sinks, mean)
      pairs      [{families: [a, b], scores: {score: {mean_difference, beyond_chance, rank_correlation}}, other_role}]: half the
                 texts of a and half of b, head by head; with a = b the two halves of one family, which is chance. beyond_chance:
                 share of heads whose difference is outside its 95 % interval; other_role: share of heads with another role
    plans     [{name, calibrated_on, seed, kept, patterns, verified}], files `<name>.json` in the checkpoint folder
    cells     [{calibrated_on, tested_on, kl, interval, right, right_full, asked}], both seeds' plans together: KL of text in nats
              a token; answers of both plans, and of the model itself as often
    advantage [{calibrated_on, tested_on, kl, interval}]: KL of another's plans less that of the family's own, paired over tokens
    own       {kl, interval}: the mean advantage over other single families, all families together
    noise     [{tested_on, kl, interval}]: KL of the family's second plan less that of its first
    agreement [{plans: [a, b], rank_correlation, moved}]: keys kept by each KV head, a's and b's plans of different seeds; with
              a = b of one family's two. moved: share of a's keys that b gives to other heads

Intervals are the bootstrap of quality.py. Everything that is done is kept in the checkpoint folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.bench.heading import heading
from headsink.bench.options import check_families
from headsink.calibration.calibrate import Calibration
from headsink.census.compare import COMPARED, compare
from headsink.census.head_statistics import KEPT, windows
from headsink.census.results import Census
from headsink.census.roles import window_needed
from headsink.census.run import analyze, remove_checkpoint
from headsink.data import corpus
from headsink.data import documents as probes
from headsink.data.corpus import Domain
from headsink.data.documents import TEXT, Document
from headsink.data.domains import KINDS, check_domains
from headsink.errors import HeadsinkError
from headsink.evaluation.options import CONTINUATION
from headsink.evaluation.quality import Scored, intervals, score_each
from headsink.models.devices import dtype_name
from headsink.models.fingerprint import Fingerprint
from headsink.plan.plan import Plan
from headsink.utils.files import parse_json, read_text, remove, write_text
from headsink.utils.progress import bar
from headsink.utils.statistics import interval, rank_correlation

DEFAULT = "default"  # the plan of corpus.DOMAINS
APART = 1000  # between the seeds of a family's two plans: documents have the seeds after theirs
CANDIDATES = 24  # texts or documents of which those are taken that share least
SHARED = 16  # tokens in a row that count as shared


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    budget: float,
    checkpoint: Path,
    families: Sequence[str] = KINDS,
    documents: int = 4,
    texts: int = 6,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure it all, see above.

    Parameters
    ----------
    context : tokens of the texts of the census, of the calibration documents, and of the held-out ones.
    budget : of all plans.
    checkpoint : folder for the plans, and for what is done; the same call goes on from there.
    families : kinds of text, two or more of `KINDS`.
    documents : held-out documents of each family.
    texts : texts of each family in the census, half of which are compared with other halves; even, 4 or more.
    """
    kinds = check_families(families, documents, texts, budget)
    settings = {
        "context": context,
        "budget": budget,
        "families": list(kinds),
        "documents": documents,
        "texts": texts,
        "seed": seed,
        "model": model.config.name_or_path,
        "weights": Fingerprint.of(model).weights,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
    }
    _claim(checkpoint, settings)
    seeds = (seed, seed + APART)
    held_out, shared = _documents(tokenizer, kinds, context, documents, seed)
    read, repeated = _texts(tokenizer, kinds, context, texts, seed)
    plans = {
        (name, one): _plan(model, tokenizer, name, one, context, budget, checkpoint, progress)
        for one in seeds
        for name in (DEFAULT, *kinds)
    }
    census = analyze(
        model, tokenizer, lengths=[context], texts=read, seed=seed, checkpoint=checkpoint / "census", progress=progress
    )
    found = _tested(model, plans, held_out, checkpoint, progress)
    return (
        heading("patterns of kinds of text: census and plans, each on its own kind and on the others")
        | settings
        | {"seeds": list(seeds), "threads": torch.get_num_threads()}
        | {"overlap": {kind: {"texts": repeated[kind], "documents": shared[kind]} for kind in kinds}}
        | {"census": _census(census, kinds, context)}
        | {"plans": [_described(name, one, plan) for (name, one), plan in plans.items()]}
        | _matrix(found, kinds, seeds)
        | {"agreement": _agreement(plans, kinds, seeds, context)}
    )


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Begin in a folder, or go on in it. Raises HeadsinkError if it holds something else."""
    ours = folder / "settings.json"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not ours.is_file())):
        raise HeadsinkError(f"checkpoint: {folder} is not a folder of this measurement; name another one")
    if ours.is_file() and parse_json(read_text(ours), str(ours)) != settings:
        raise HeadsinkError(f"checkpoint: {folder} is of other settings; name another one, or remove it")
    if not ours.is_file():
        write_text(ours, json.dumps(settings, indent=1))


def clear(folder: Path) -> None:
    """Remove what `run` has left in its folder, and the folder if nothing else is in it."""
    settings = parse_json(read_text(folder / "settings.json"), str(folder / "settings.json"))
    kinds, seed = settings["families"], settings["seed"]
    remove(folder / "tested", [f"{kind}-{number}.json" for kind in kinds for number in range(settings["documents"])])
    remove_checkpoint(folder / "census")
    plans = [f"{_name(name, one)}.json" for one in (seed, seed + APART) for name in (DEFAULT, *kinds)]
    remove(folder, [*plans, "settings.json"])


# texts that share little


def _texts(
    tokenizer: PreTrainedTokenizerBase, kinds: Sequence[Domain], length: int, count: int, seed: int
) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """Held-out texts for the census, by family, and how much they share."""
    found: dict[str, list[str]] = {}
    overlap: dict[str, list[float]] = {}
    for kind in kinds:
        options = [corpus.text(kind, tokenizer, length, seed=seed + n, split="heldout") for n in range(CANDIDATES)]
        ids = [tokenizer(text, verbose=False)["input_ids"][:length] for text in options]
        if (least := min(map(len, ids))) < length:
            raise HeadsinkError(f"context: the built-in {kind} has {least} tokens, {length} were asked for")
        chosen, overlap[kind] = _apart(ids, count)
        found[kind] = [options[n] for n in chosen]
    return found, overlap


def _documents(
    tokenizer: PreTrainedTokenizerBase, kinds: Sequence[Domain], context: int, count: int, seed: int
) -> tuple[dict[str, list[Document]], dict[str, list[float]]]:
    """Held-out documents that are `context` tokens with what follows them, by family, and how much they share."""
    found: dict[str, list[Document]] = {}
    overlap: dict[str, list[float]] = {}
    for kind in kinds:
        options = [
            probes.document(
                tokenizer,
                context - CONTINUATION,
                split="heldout",
                seed=seed + n,
                domains=(kind,),
                continuation=CONTINUATION,
            )
            for n in range(CANDIDATES)
        ]
        chosen, overlap[kind] = _apart([one.ids + one.continuation for one in options], count)
        found[kind] = [options[n] for n in chosen]
    return found, overlap


def _apart(texts: Sequence[Sequence[int]], count: int) -> tuple[list[int], list[float]]:
    """Texts that share little, by number: the first, then always the one that shares least with those; mean and most shared."""
    parts = [{tuple(ids[n : n + SHARED]) for n in range(len(ids) - SHARED)} for ids in texts]
    chosen, shared = [0], []
    while len(chosen) < count:
        most = {
            n: max(len(part & parts[other]) / max(1, len(part)) for other in chosen)
            for n, part in enumerate(parts)
            if n not in chosen
        }
        if not most:
            raise HeadsinkError(f"documents, texts: {count} asked for, at most {len(texts)} are there")
        chosen.append(min(most, key=lambda n: (most[n], n)))
        shared.append(most[chosen[-1]])
    return chosen, [sum(shared) / max(1, len(shared)), max(shared, default=0.0)]


# census


def _census(census: Census, kinds: Sequence[Domain], length: int) -> dict[str, Any]:
    parts = {
        (kind, half): _part(census, census.texts(length, kind)[half::2], length) for kind in kinds for half in (0, 1)
    }
    pairs = []
    for a, b in combinations_with_replacement(kinds, 2):
        found = compare(parts[a, 0], parts[b, 1])
        scores = {
            view.score: {
                name: view.to_dict()[name] for name in ("mean_difference", "beyond_chance", "rank_correlation")
            }
            for view in found.views
        }
        pairs.append({"families": [a, b], "scores": scores, "other_role": len(found.changed) / found.heads})
    return {"families": {kind: _looks(census, kind, length) for kind in kinds}, "pairs": pairs}


def _part(census: Census, numbers: Sequence[int], length: int) -> Census:
    """A census of some of the texts, as if they were of one kind, and of its full layers only."""
    full = [layer for layer, window in enumerate(census.settings["model"]["sliding"]) if window is None]
    arrays = {
        f"{new}.{length}.{name}": census.arrays[f"{old}.{length}.{name}"][full]
        for new, old in enumerate(numbers)
        for name in ("scores", "uniform")
    } | {f"{new}.ids": census.arrays[f"{old}.ids"] for new, old in enumerate(numbers)}
    shape = census.settings["model"] | {"layers": len(full), "sliding": [None] * len(full)}
    texts = [census.settings["texts"][old] | {"domain": "part"} for old in numbers]
    return Census(census.settings | {"model": shape, "texts": texts}, census.vocabulary, arrays)


def _looks(census: Census, kind: Domain, length: int) -> dict[str, Any]:
    """What the heads of full layers look at on texts of a kind."""
    full = [layer for layer, window in enumerate(census.settings["model"]["sliding"]) if window is None]
    counted = Counter(role for layer in full for role in census.roles(length, kind)[layer])
    errors = census.samples("group_errors", length, kind)[:, full][..., KEPT.index("secondary"), :]
    needed = window_needed(errors, windows(length), length).flatten(1)  # [texts, heads]
    sinks = [(census.arrays[f"{n}.{length}.secondary"][full] >= 0).double() for n in census.texts(length, kind)]
    secondary = torch.stack([one.sum(-1).flatten() for one in sinks])
    first = census.settings["limits"]["first"]
    figures = {
        "window": needed.median(1).values,
        "kept": ((needed + secondary + first).clamp(max=length) / length).mean(1),
        "all": (needed >= length).double().mean(1),
        "secondary": secondary.mean(1),
    }
    return {
        "roles": {role: count / counted.total() for role, count in counted.most_common()},
        "scores": {name: _number(census.samples(name, length, kind)[:, full].flatten(1).mean(1)) for name in COMPARED},
        "keys": {name: _number(of) for name, of in figures.items()},
    }


def _number(samples: Tensor) -> dict[str, float]:
    """Of a number for each text."""
    mean, half = interval(samples)
    return {"mean": float(mean), "half": float(half)}


# plans


def _name(calibrated_on: str, seed: int) -> str:
    return f"{calibrated_on}-{seed}"


def _plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibrated_on: str,
    seed: int,
    context: int,
    budget: float,
    folder: Path,
    progress: bool,
) -> Plan:
    """A plan of a family, or the default one; read if it is made already."""
    path = folder / f"{_name(calibrated_on, seed)}.json"
    if not path.is_file():
        domains = corpus.DOMAINS if calibrated_on == DEFAULT else check_domains([calibrated_on])
        kept = path.with_suffix(".partial")
        calibration = Calibration(
            model, tokenizer, context=context, domains=domains, seed=seed, checkpoint=kept, progress=progress
        )
        calibration.plan(budget).save(path)
        kept.unlink(missing_ok=True)
    return Plan.load(path)


def _described(calibrated_on: str, seed: int, plan: Plan) -> dict[str, Any]:
    of = {"name": _name(calibrated_on, seed), "calibrated_on": calibrated_on, "seed": seed}
    made = plan.calibration
    return of | {"kept": made["kept"], "patterns": plan.counts(), "verified": made["verified"]}


Cells = dict[tuple[str, int, str], list[dict[str, Any]]]  # calibrated on, seed, tested on: a record of each document


def _tested(
    model: PreTrainedModel,
    plans: dict[tuple[str, int], Plan],
    documents: dict[str, list[Document]],
    folder: Path,
    progress: bool,
) -> Cells:
    """Every plan on every document: KL of the text token by token, and answers right. Kept by document."""
    found: Cells = {}
    with bar("testing", sum(map(len, documents.values())), progress) as shown:
        for kind, of_kind in documents.items():
            for number, document in enumerate(of_kind):
                path = folder / "tested" / f"{kind}-{number}.json"
                if not path.is_file():
                    scored = score_each(model, list(plans.values()), document)
                    records = {_name(*key): _record(one) for key, one in zip(plans, scored, strict=True)}
                    write_text(path, json.dumps(records))
                records = json.loads(path.read_text(encoding="utf-8"))
                for name, seed in plans:
                    found.setdefault((name, seed, kind), []).append(records[_name(name, seed)])
                shown.advance(shown.task_ids[0])
    return found


def _record(scored: Sequence[Scored]) -> dict[str, Any]:
    asked = [one for one in scored if one.form != TEXT]
    return {
        "kl": scored[0].kl.tolist(),
        "right": sum(one.right_plan for one in asked),
        "right_full": sum(one.right_full for one in asked),
        "asked": len(asked),
    }


def _matrix(found: Cells, kinds: Sequence[str], seeds: tuple[int, int]) -> dict[str, Any]:
    """Cells, what is won by a family's own plans, and how far its two are apart."""

    def kl(name: str, tested: str, seed: int | None = None) -> Tensor:
        """Of every token, float64 [documents, tokens]; the mean of both plans if no seed is named."""
        of = [found[name, one, tested] for one in (seeds if seed is None else (seed,))]
        return torch.tensor([[row["kl"] for row in rows] for rows in of], dtype=torch.float64).mean(0)

    def mean(series: Tensor) -> dict[str, Any]:
        return {"kl": float(series.mean()), "interval": list(intervals([row[None] for row in series])[0])}

    rows = (DEFAULT, *kinds)
    cells = [
        {"calibrated_on": name, "tested_on": tested}
        | mean(kl(name, tested))
        | {
            what: sum(row[what] for one in seeds for row in found[name, one, tested])
            for what in ("right", "right_full", "asked")
        }
        for name in rows
        for tested in kinds
    ]
    advantage = {
        (name, tested): kl(name, tested) - kl(tested, tested) for name in rows for tested in kinds if name != tested
    }
    own = [torch.stack([advantage[name, tested] for name in kinds if name != tested]).mean(0) for tested in kinds]
    noise = {tested: kl(tested, tested, seeds[1]) - kl(tested, tested, seeds[0]) for tested in kinds}
    return {
        "cells": cells,
        "advantage": [{"calibrated_on": a, "tested_on": b} | mean(series) for (a, b), series in advantage.items()],
        "own": mean(torch.cat(own)),
        "noise": [{"tested_on": tested} | mean(series) for tested, series in noise.items()],
    }


def _agreement(
    plans: dict[tuple[str, int], Plan], kinds: Sequence[str], seeds: tuple[int, int], context: int
) -> list[dict[str, Any]]:
    def keys(name: str, seed: int) -> Tensor:
        """Kept by each KV head, float64 [heads]."""
        heads = [head for layer in plans[name, seed].layers for head in layer or ()]
        return torch.tensor([head.pattern.size(context) for head in heads], dtype=torch.float64)

    found = []
    for a, b in combinations_with_replacement((DEFAULT, *kinds), 2):
        pairs = [(keys(a, one), keys(b, other)) for one, other in (seeds, seeds[::-1])]
        correlations = [rho for rho in (rank_correlation(*pair) for pair in pairs) if rho is not None]
        found.append(
            {
                "plans": [a, b],
                "rank_correlation": sum(correlations) / len(correlations) if correlations else None,
                "moved": sum(float((x - y).abs().sum() / (x.sum() + y.sum())) for x, y in pairs) / len(pairs),
            }
        )
    return found
