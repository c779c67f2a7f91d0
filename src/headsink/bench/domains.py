"""Do attention patterns and plans depend on the domain of the text: prose, code, maths, chat, questions?

Census: compare texts of two domains with each other, and with the difference between texts of one domain. Plans: calibrate on
every domain and on the default mix, with two document seeds each, all at one budget; test every plan on held-out documents of
every domain. Domains matter if a domain's own plan beats another domain's there by more than its own two seeds differ.

`run` returns a dictionary of JSON values; a "family" is a domain:

    context, budget, families, documents, texts, seed, seeds, model, dtype, device, versions, machine, threads
    overlap   {family: {texts: [mean, max], documents: [mean, max]}}: share of one that is also in another
    census    of full-attention layers, at `context` tokens
      families   {family: {roles: {role: share of query heads}, scores: {score: number}, keys: {figure: number}}}
                 number: {mean, half}, over texts; half is the half width of the 95 % interval. keys, per KV head, for an error
                 within 1 % of the output: window (median), kept (mean share of all keys: window and sinks), all (share of
                 heads that need every key), secondary (mean number of secondary sinks)
      pairs      [{families: [a, b], scores: {score: {mean_difference, beyond_chance, rank_correlation}}, other_role}]: half of
                 the texts of a against half of b, per head; a = b compares the two halves of one family, the chance level.
                 beyond_chance: share of heads whose difference is outside its 95 % interval; other_role: share of heads that
                 change role
    plans     [{name, calibrated_on, seed, kept, patterns, verified}]; files `<name>.json` in the checkpoint folder
    cells     [{calibrated_on, tested_on, kl, interval, right, right_full, asked}], over both seeds: KL in nats per token;
              right, right_full: correct answers of the plans and of the full cache, of `asked`
    advantage [{calibrated_on, tested_on, kl, interval}]: KL of the other plans minus that of the family's own, paired by token
    own       {kl, interval}: mean advantage over the other single families, over all families
    noise     [{tested_on, kl, interval}]: KL of the family's second plan minus that of its first
    agreement [{plans: [a, b], rank_correlation, moved}]: number of keys per KV head in plans of a and b with different seeds
              (a = b: the two plans of one family). moved: share of a's keys that b allocates to other heads

Intervals are bootstrap intervals (evaluation/quality.py). The checkpoint folder keeps every finished part.
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

DEFAULT = "default"  # name of the plan calibrated on corpus.DOMAINS
SEED_DISTANCE = 1000  # between a domain's two plans; documents use the seeds that follow the plan's
CANDIDATES = 24  # texts or documents, of which those with the least overlap are chosen
OVERLAP_TOKENS = 16  # length of a token run that counts as shared


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
    """Run the whole measurement and return the dictionary described above.

    Parameters
    ----------
    context : length in tokens of census texts, calibration documents and held-out documents.
    budget : KV budget of all plans, a fraction of the full cache.
    checkpoint : folder for the plans and finished parts; the same call resumes from it.
    families : domains to compare, two or more of `KINDS`.
    documents : number of held-out documents per domain.
    texts : number of census texts per domain; even, 4 or more, because halves are compared.
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
    seeds = (seed, seed + SEED_DISTANCE)
    held_out, document_overlap = _documents(tokenizer, kinds, context, documents, seed)
    census_texts, text_overlap = _texts(tokenizer, kinds, context, texts, seed)
    plans = {
        (name, one): _plan(model, tokenizer, name, one, context, budget, checkpoint, progress)
        for one in seeds
        for name in (DEFAULT, *kinds)
    }
    census = analyze(
        model,
        tokenizer,
        lengths=[context],
        texts=census_texts,
        seed=seed,
        checkpoint=checkpoint / "census",
        progress=progress,
    )
    found = _test(model, plans, held_out, checkpoint, progress)
    return (
        heading("patterns of kinds of text: census and plans, each on its own kind and on the others")
        | settings
        | {"seeds": list(seeds), "threads": torch.get_num_threads()}
        | {"overlap": {kind: {"texts": text_overlap[kind], "documents": document_overlap[kind]} for kind in kinds}}
        | {"census": _census(census, kinds, context)}
        | {"plans": [_description(name, one, plan) for (name, one), plan in plans.items()]}
        | _matrix(found, kinds, seeds)
        | {"agreement": _agreement(plans, kinds, seeds, context)}
    )


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Create the checkpoint folder, or resume it. Raises HeadsinkError if it contains something else."""
    ours = folder / "settings.json"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not ours.is_file())):
        raise HeadsinkError(f"checkpoint: {folder} is not a folder of this measurement; name another one")
    if ours.is_file() and parse_json(read_text(ours), str(ours)) != settings:
        raise HeadsinkError(f"checkpoint: {folder} was made with other settings; name another one, or remove it")
    if not ours.is_file():
        write_text(ours, json.dumps(settings, indent=1))


def clear(folder: Path) -> None:
    """Remove the files of `run` from its checkpoint folder, and the folder if it is empty then."""
    settings = parse_json(read_text(folder / "settings.json"), str(folder / "settings.json"))
    kinds, seed = settings["families"], settings["seed"]
    remove(folder / "tested", [f"{kind}-{number}.json" for kind in kinds for number in range(settings["documents"])])
    remove_checkpoint(folder / "census")
    plans = [f"{_name(name, one)}.json" for one in (seed, seed + SEED_DISTANCE) for name in (DEFAULT, *kinds)]
    remove(folder, [*plans, "settings.json"])


# texts with little overlap


def _texts(
    tokenizer: PreTrainedTokenizerBase, kinds: Sequence[Domain], length: int, count: int, seed: int
) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """Return held-out texts for the census by domain, and their overlap [mean, max]."""
    found: dict[str, list[str]] = {}
    overlap: dict[str, list[float]] = {}
    for kind in kinds:
        options = [corpus.text(kind, tokenizer, length, seed=seed + n, split="heldout") for n in range(CANDIDATES)]
        ids = [tokenizer(text, verbose=False)["input_ids"][:length] for text in options]
        if (least := min(map(len, ids))) < length:
            raise HeadsinkError(
                f"context: the built-in {kind} has {least} tokens, fewer than {length}; give at most {least}"
            )
        chosen, overlap[kind] = _least_overlap(ids, count)
        found[kind] = [options[n] for n in chosen]
    return found, overlap


def _documents(
    tokenizer: PreTrainedTokenizerBase, kinds: Sequence[Domain], context: int, count: int, seed: int
) -> tuple[dict[str, list[Document]], dict[str, list[float]]]:
    """Return held-out documents of `context` tokens, continuation included, by domain, and their overlap [mean, max]."""
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
        chosen, overlap[kind] = _least_overlap([one.ids + one.continuation for one in options], count)
        found[kind] = [options[n] for n in chosen]
    return found, overlap


def _least_overlap(texts: Sequence[Sequence[int]], count: int) -> tuple[list[int], list[float]]:
    """Choose texts greedily: the first, then the one with the least overlap with those chosen. Returns indices, [mean, max]."""
    parts = [{tuple(ids[n : n + OVERLAP_TOKENS]) for n in range(len(ids) - OVERLAP_TOKENS)} for ids in texts]
    chosen, shared = [0], []
    while len(chosen) < count:
        most = {
            n: max(len(part & parts[other]) / max(1, len(part)) for other in chosen)
            for n, part in enumerate(parts)
            if n not in chosen
        }
        if not most:
            raise HeadsinkError(f"documents, texts: {count} is too many; give at most {len(texts)}")
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
    return {"families": {kind: _domain_summary(census, kind, length) for kind in kinds}, "pairs": pairs}


def _part(census: Census, numbers: Sequence[int], length: int) -> Census:
    """Return a census of some of the texts as one domain, with full-attention layers only."""
    full = [layer for layer, window in enumerate(census.settings["model"]["sliding"]) if window is None]
    arrays = {
        f"{new}.{length}.{name}": census.arrays[f"{old}.{length}.{name}"][full]
        for new, old in enumerate(numbers)
        for name in ("scores", "uniform")
    } | {f"{new}.ids": census.arrays[f"{old}.ids"] for new, old in enumerate(numbers)}
    shape = census.settings["model"] | {"layers": len(full), "sliding": [None] * len(full)}
    texts = [census.settings["texts"][old] | {"domain": "part"} for old in numbers]
    return Census(census.settings | {"model": shape, "texts": texts}, census.vocabulary, arrays)


def _domain_summary(census: Census, kind: Domain, length: int) -> dict[str, Any]:
    """Summarise the statistics of full-attention layers on the texts of a domain."""
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
    """Return the mean over texts and the half width of its 95 % interval."""
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
    """Load the plan of a domain (or the default plan) from the checkpoint folder; calibrate it if it is not there."""
    path = folder / f"{_name(calibrated_on, seed)}.json"
    if not path.is_file():
        domains = corpus.DOMAINS if calibrated_on == DEFAULT else check_domains([calibrated_on])
        partial = path.with_suffix(".partial")
        calibration = Calibration(
            model, tokenizer, context=context, domains=domains, seed=seed, checkpoint=partial, progress=progress
        )
        calibration.plan(budget).save(path)
        partial.unlink(missing_ok=True)
    return Plan.load(path)


def _description(calibrated_on: str, seed: int, plan: Plan) -> dict[str, Any]:
    identity = {"name": _name(calibrated_on, seed), "calibrated_on": calibrated_on, "seed": seed}
    calibration = plan.calibration
    return identity | {
        "kept": calibration["kept"],
        "patterns": plan.counts(),
        "verified": calibration["verified"],
    }


Cells = dict[tuple[str, int, str], list[dict[str, Any]]]  # (calibrated on, seed, tested on): one record per document


def _test(
    model: PreTrainedModel,
    plans: dict[tuple[str, int], Plan],
    documents: dict[str, list[Document]],
    folder: Path,
    progress: bool,
) -> Cells:
    """Score every plan on every document: KL per token, and correct answers. Results are saved per document."""
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
    questions = [one for one in scored if one.form != TEXT]
    return {
        "kl": scored[0].kl.tolist(),
        "right": sum(one.right_plan for one in questions),
        "right_full": sum(one.right_full for one in questions),
        "asked": len(questions),
    }


def _matrix(found: Cells, kinds: Sequence[str], seeds: tuple[int, int]) -> dict[str, Any]:
    """Return the cells, the advantage of each domain's own plans, and the difference between its two plans."""

    def kl(name: str, tested: str, seed: int | None = None) -> Tensor:
        """Return the KL of every token, float64 [documents, tokens]; the mean over both seeds if none is given."""
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
    own_advantage = [
        torch.stack([advantage[name, tested] for name in kinds if name != tested]).mean(0) for tested in kinds
    ]
    noise = {tested: kl(tested, tested, seeds[1]) - kl(tested, tested, seeds[0]) for tested in kinds}
    return {
        "cells": cells,
        "advantage": [{"calibrated_on": a, "tested_on": b} | mean(series) for (a, b), series in advantage.items()],
        "own": mean(torch.cat(own_advantage)),
        "noise": [{"tested_on": tested} | mean(series) for tested, series in noise.items()],
    }


def _agreement(
    plans: dict[tuple[str, int], Plan], kinds: Sequence[str], seeds: tuple[int, int], context: int
) -> list[dict[str, Any]]:
    def keys(name: str, seed: int) -> Tensor:
        """Return the number of keys that each KV head keeps, float64 [heads]."""
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
