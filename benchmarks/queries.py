"""Error of a census over evenly spaced queries, against one over all queries.

python benchmarks/queries.py --tokens 4096 --out benchmarks/results/queries.json

For each score: its standard deviation over texts (mean over heads), and the absolute error of the sampled score per text and head
(mean, 95th percentile, maximum).
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import headsink
from headsink.census.head_statistics import SCORES
from headsink.census.options import QUERIES
from headsink.census.results import Census
from headsink.census.roles import ROLES
from headsink.utils.files import write_text

SAMPLED = (128, 256, QUERIES, 1024)


def difference(some: Census, every: Census, name: str, tokens: int) -> dict[str, float]:
    a, b = (census.samples(name, tokens) for census in (some, every))
    off = (a - b).abs().flatten()
    return {
        "mean": float(off.mean()),
        "p95": float(off.quantile(0.95)),
        "largest": float(off.max()),
        "spread_over_texts": float(b.std(0).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--texts", type=int, default=1, help="number for each domain")
    parser.add_argument("--domains", default="prose,code,maths,chat")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = headsink.load(arguments.model)
    options: dict[str, Any] = {
        "lengths": [arguments.tokens],
        "domains": arguments.domains.split(","),
        "texts_per_domain": arguments.texts,
    }
    every = headsink.analyze(model, tokenizer, queries=arguments.tokens, **options)
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "model": every.settings["model"],
        "tokens": arguments.tokens,
        "texts": len(every.settings["texts"]),
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
        "queries": {},
    }
    names = [ROLES.index(role) for layer in every.roles(arguments.tokens) for role in layer]
    for queries in SAMPLED:
        some = headsink.analyze(model, tokenizer, queries=queries, **options)
        roles = [ROLES.index(role) for layer in some.roles(arguments.tokens) for role in layer]
        errors = (every.score("errors", arguments.tokens), some.score("errors", arguments.tokens))
        ratio = (errors[1] / errors[0].clamp(min=1e-6)).flatten()
        result["queries"][queries] = {name: difference(some, every, name, arguments.tokens) for name in SCORES} | {
            "same_role": float((torch.tensor(roles) == torch.tensor(names)).double().mean()),
            "error_ratio": ratio.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist(),
        }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["queries"], indent=1))


if __name__ == "__main__":
    main()
