"""Plans of each domain, tested on every domain: the matrix of what one domain's plan costs on another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.calibration.calibrate import Calibration
from headsink.data import corpus
from headsink.data.documents import TEXT, Document
from headsink.data.domains import check_domains
from headsink.evaluation.quality import ContinuationScore, intervals, score
from headsink.plan.plan import Plan
from headsink.utils.files import write_text
from headsink.utils.progress import bar
from headsink.utils.statistics import interval, rank_correlation

DEFAULT = "default"  # name of the plan calibrated on corpus.DOMAINS


SEED_DISTANCE = 1000  # between a domain's two plans; documents use the seeds that follow the plan's


def as_number(samples: Tensor) -> dict[str, float]:
    """Return the mean over texts and the half width of its 95 % interval."""
    mean, half = interval(samples)
    return {"mean": float(mean), "half": float(half)}


def plan_name(calibrated_on: str, seed: int) -> str:
    return f"{calibrated_on}-{seed}"


def make_plan(
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
    path = folder / f"{plan_name(calibrated_on, seed)}.json"
    if not path.is_file():
        domains = corpus.DOMAINS if calibrated_on == DEFAULT else check_domains([calibrated_on])
        partial = path.with_suffix(".partial")
        calibration = Calibration(
            model, tokenizer, context=context, domains=domains, seed=seed, checkpoint=partial, progress=progress
        )
        calibration.plan(budget).save(path)
        partial.unlink(missing_ok=True)
    return Plan.load(path)


def describe_plan(calibrated_on: str, seed: int, plan: Plan) -> dict[str, Any]:
    identity = {"name": plan_name(calibrated_on, seed), "calibrated_on": calibrated_on, "seed": seed}
    calibration = plan.calibration
    return identity | {
        "kept": calibration["kept"],
        "patterns": plan.counts(),
        "verified": calibration["verified"],
    }


Cells = dict[tuple[str, int, str], list[dict[str, Any]]]  # (calibrated on, seed, tested on): one record per document


def measure_plan(
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
                    scored = score(model, list(plans.values()), document)
                    records = {plan_name(*key): quality_record(one) for key, one in zip(plans, scored, strict=True)}
                    write_text(path, json.dumps(records))
                records = json.loads(path.read_text(encoding="utf-8"))
                for name, seed in plans:
                    found.setdefault((name, seed, kind), []).append(records[plan_name(name, seed)])
                shown.advance(shown.task_ids[0])
    return found


def quality_record(scored: Sequence[ContinuationScore]) -> dict[str, Any]:
    questions = [one for one in scored if one.form != TEXT]
    return {
        "kl": scored[0].kl.tolist(),
        "right": sum(one.right_plan for one in questions),
        "right_full": sum(one.right_full for one in questions),
        "asked": len(questions),
    }


def plan_matrix(found: Cells, kinds: Sequence[str], seeds: tuple[int, int]) -> dict[str, Any]:
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


def plan_agreement(
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
