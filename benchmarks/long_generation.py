"""What eviction during decoding costs: delta NLL of a text right after a document, and after 512 more tokens.

python benchmarks/long_generation.py --out benchmarks/results/long-generation-smollm2.json

A document is read under a packaged plan, scaled to it. Then the source text that follows is decoded, teacher-forced, while the
plan evicts at every token. The first and the last 256 of its 768 tokens are compared with the full cache. What 512 tokens of
eviction add is the difference of the two.

The text goes through the model in one call under sparse prefill, which keeps the same keys for every token as one call per token
(tests/runtime/test_table_of_calls.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

import headsink
from headsink.bench.heading import provenance
from headsink.cache.layer import PlanLayer
from headsink.data import corpus
from headsink.data import documents as probes
from headsink.plan.plan import Plan
from headsink.runtime.prefill import prefill
from headsink.runtime.scoring import forward
from headsink.utils.files import write_text
from headsink.utils.statistics import interval

GENERATED, SCORED, SEED = 512, 256, 2000


def nll(model: PreTrainedModel, plan: Plan | None, ids: list[int], text: list[int]) -> Tensor:
    """Negative log-likelihood of each token of a text after a document but the first, float64 [tokens - 1]."""
    cache: Cache = prefill(model, plan, torch.tensor([ids], device=model.device), exact=False)
    for layer in cache.layers:
        if isinstance(layer, PlanLayer):
            layer.prefill = replace(layer.prefill, dense=False)
    log_probs = forward(model, cache, text, len(text))[:-1].float().log_softmax(-1)
    return -log_probs.gather(1, torch.tensor(text[1:], device=model.device)[:, None])[:, 0].double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="0.5,0.25,0.125")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=2, help="of each domain")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = headsink.load("smollm2", dtype="float32", device="cpu")
    budgets = [float(budget) for budget in arguments.budgets.split(",")]
    records: list[dict[str, Any]] = []
    for number in range(arguments.documents):
        for domain in corpus.DOMAINS:
            document = probes.document(
                tokenizer,
                arguments.context,
                split="heldout",
                seed=SEED + number,
                domains=(domain,),
                continuation=GENERATED + SCORED,
            )
            full = nll(model, None, document.ids, document.continuation)
            for budget in budgets:
                plan = headsink.packaged_plan("smollm2", budget, len(document.ids))
                change = nll(model, plan.model_copy(update={"quality": ()}), document.ids, document.continuation) - full
                first, last = (float(part.mean()) for part in (change[:SCORED], change[-SCORED:]))
                records.append({"document": f"{domain}-{number}", "budget": budget, "first": first, "last": last})
                print(records[-1], file=sys.stderr)
    summary = {}
    for budget in budgets:
        own = torch.tensor([[r["first"], r["last"], r["last"] - r["first"]] for r in records if r["budget"] == budget])
        mean, half = interval(own.double())
        names = ("delta_nll_first", "delta_nll_last", "added")
        summary[budget] = {name: [float(m), float(h)] for name, m, h in zip(names, mean, half, strict=True)}
    what = (
        "delta NLL of the first and last 256 of 768 decoded tokens, and what was added; mean, half of the 95 % interval"
    )
    found = provenance(what) | {"context": arguments.context, "summary": summary, "records": records}
    write_text(arguments.out, json.dumps(found, indent=1))
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
