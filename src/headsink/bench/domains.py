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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.bench.domain_plans import (
    DEFAULT,
    SEED_DISTANCE,
    as_number,
    describe_plan,
    make_plan,
    measure_plan,
    plan_agreement,
    plan_matrix,
    plan_name,
)
from headsink.bench.heading import provenance
from headsink.bench.options import check_families
from headsink.census.compare import COMPARED, compare
from headsink.census.head_statistics import KEPT, windows
from headsink.census.results import Census
from headsink.census.roles import required_window
from headsink.census.run import analyze, remove_checkpoint
from headsink.data import corpus
from headsink.data import documents as probes
from headsink.data.corpus import Domain
from headsink.data.documents import Document
from headsink.data.domains import KINDS
from headsink.errors import HeadsinkError
from headsink.evaluation.options import CONTINUATION
from headsink.models.devices import dtype_name
from headsink.models.fingerprint import Fingerprint
from headsink.utils.files import parse_json, read_text, remove, write_text

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
        (name, one): make_plan(model, tokenizer, name, one, context, budget, checkpoint, progress)
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
    found = measure_plan(model, plans, held_out, checkpoint, progress)
    return (
        provenance("patterns of kinds of text: census and plans, each on its own kind and on the others")
        | settings
        | {"seeds": list(seeds), "threads": torch.get_num_threads()}
        | {"overlap": {kind: {"texts": text_overlap[kind], "documents": document_overlap[kind]} for kind in kinds}}
        | {"census": _census(census, kinds, context)}
        | {"plans": [describe_plan(name, one, plan) for (name, one), plan in plans.items()]}
        | plan_matrix(found, kinds, seeds)
        | {"agreement": plan_agreement(plans, kinds, seeds, context)}
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
    plans = [f"{plan_name(name, one)}.json" for one in (seed, seed + SEED_DISTANCE) for name in (DEFAULT, *kinds)]
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
    layers = [census.layers[row] for row in full]
    shape = census.settings["model"] | {"layers": len(full), "numbers": layers, "sliding": [None] * len(full)}
    texts = [census.settings["texts"][old] | {"domain": "part"} for old in numbers]
    return Census(census.settings | {"model": shape, "texts": texts}, census.vocabulary, arrays)


def _domain_summary(census: Census, kind: Domain, length: int) -> dict[str, Any]:
    """Summarise the statistics of full-attention layers on the texts of a domain."""
    full = [layer for layer, window in enumerate(census.settings["model"]["sliding"]) if window is None]
    counted = Counter(role for layer in full for role in census.roles(length, kind)[layer])
    errors = census.samples("group_errors", length, kind)[:, full][..., KEPT.index("secondary"), :]
    needed = required_window(errors, windows(length), length).flatten(1)  # [texts, heads]
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
        "scores": {
            name: as_number(census.samples(name, length, kind)[:, full].flatten(1).mean(1)) for name in COMPARED
        },
        "keys": {name: as_number(of) for name, of in figures.items()},
    }


# plans
