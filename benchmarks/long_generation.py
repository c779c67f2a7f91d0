"""What eviction during decoding costs as generation goes on: agreement with the full cache on thousands of decoded tokens.

python benchmarks/long_generation.py --out benchmarks/results/long-generation-smollm2.json

A document (prose, code, worked maths problems, chat) is read under a packaged plan. A plan keeps a fixed number of keys, so it is
scaled once to the document and once to document and output together. Then the source text that
follows is decoded, teacher-forced, while the plan evicts at every token. Every 256 tokens are compared with the full cache: delta
NLL, KL(full || plan), the share of tokens with the same most likely next token, and the bytes of the cache. What eviction adds is
the difference between the last and the first 256.

A part of 256 tokens goes through the model in one call under sparse prefill, which keeps the same keys for every token as one
call per token (tests/runtime/test_table_of_calls.py).
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
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

import headsink
from headsink.bench.heading import provenance
from headsink.cache.cache import nbytes
from headsink.cache.layer import PlanLayer
from headsink.data import corpus
from headsink.data import documents as probes
from headsink.data.documents import Document
from headsink.errors import HeadsinkError
from headsink.plan.plan import Plan
from headsink.runtime.prefill import prefill
from headsink.runtime.scoring import forward
from headsink.utils.files import write_text
from headsink.utils.statistics import interval

PART = 256  # tokens of a part
SEED, TRIED = 2000, 50  # seed of the first document of a domain, and how many are tried
FIGURES = ("delta_nll", "kl", "same_top")


def decode(model: PreTrainedModel, plan: Plan | None, ids: list[int], text: list[int]) -> tuple[Tensor, list[int]]:
    """Log-probabilities of a text after a document, float32 [tokens, vocabulary], and the bytes after each part."""
    cache: Cache = prefill(model, plan, torch.tensor([ids], device=model.device), exact=False)
    for layer in cache.layers:
        if isinstance(layer, PlanLayer):
            layer.prefill = replace(layer.prefill, dense=False)
    parts, sizes = list[Tensor](), list[int]()
    for start in range(0, len(text), PART):
        part = text[start : start + PART]
        parts.append(forward(model, cache, part, len(part)).float().log_softmax(-1))
        sizes.append(nbytes(cache))
    return torch.cat(parts), sizes


def compare(full: Tensor, plan: Tensor, text: list[int]) -> Tensor:
    """Delta NLL, KL and agreement of each part, float64 [3, parts]. The text's first token is not scored."""
    full, plan, targets = full[:-1], plan[:-1], torch.tensor(text[1:], device=full.device)[:, None]
    each = torch.stack(
        [
            (full.gather(1, targets) - plan.gather(1, targets))[:, 0],
            (full.exp() * (full - plan)).sum(-1).clamp(min=0),
            (full.argmax(-1) == plan.argmax(-1)).float(),
        ]
    ).double()
    return torch.stack([part.mean(1) for part in each.split(PART, 1)], 1)


def documents(
    tokenizer: PreTrainedTokenizerBase, domain: corpus.Domain, arguments: argparse.Namespace
) -> list[Document]:
    """Return held-out documents of a domain that are followed by enough text. Raises HeadsinkError if there are too few."""
    found, seed = list[Document](), SEED
    while len(found) < arguments.documents:
        try:
            found.append(
                probes.document(
                    tokenizer,
                    arguments.context,
                    split="heldout",
                    seed=seed,
                    domains=(domain,),
                    continuation=arguments.tokens,
                )
            )
        except HeadsinkError:  # the text of this seed ends before
            if seed >= SEED + TRIED:
                raise
        seed += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="0.5,0.25,0.125")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=2, help="of each domain")
    parser.add_argument("--tokens", type=int, default=2304, help=f"decoded; a multiple of {PART}")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.tokens < 2 * PART or arguments.tokens % PART:
        parser.error(f"--tokens: {arguments.tokens} is not a multiple of {PART}, from {2 * PART}")
    model, tokenizer = headsink.load("smollm2", dtype="float32", device="cpu")
    budgets = [float(budget) for budget in arguments.budgets.split(",")]
    ways = {f"{budget:g} of the document": (budget, 0) for budget in budgets}
    ways |= {f"{budget:g} of document and output": (budget, arguments.tokens) for budget in budgets}
    records: list[dict[str, Any]] = []
    for domain in corpus.DOMAINS:
        for number, document in enumerate(documents(tokenizer, domain, arguments)):
            full, full_bytes = decode(model, None, document.ids, document.continuation)
            for way, (budget, more) in ways.items():
                plan = headsink.packaged_plan("smollm2", budget, len(document.ids) + more)
                own, sizes = decode(model, plan.model_copy(update={"quality": ()}), document.ids, document.continuation)
                found = dict(zip(FIGURES, compare(full, own, document.continuation).tolist(), strict=True))
                name = {"document": f"{domain}-{number}", "domain": domain, "way": way}
                records.append(name | found | {"kv_bytes": sizes, "kv_bytes_full": full_bytes})
                print(records[-1], file=sys.stderr)
    summary: dict[str, dict[str, Any]] = {}
    for way in ways:
        own_records = [record for record in records if record["way"] == way]
        summary[way] = {figure: _intervals([record[figure] for record in own_records]) for figure in FIGURES}
        changes = [[record["delta_nll"][-1] - record["delta_nll"][0]] for record in own_records]
        summary[way] |= {
            "added": _intervals(changes)[0],
            "kv_bytes": _intervals([r["kv_bytes"] for r in own_records]),
        }
    what = f"agreement with the full cache by {PART} decoded tokens: mean and half of the 95 % interval over documents"
    result = provenance(what) | {"context": arguments.context, "tokens": arguments.tokens, "summary": summary}
    write_text(arguments.out, json.dumps(result | {"records": records}, indent=1))
    print(json.dumps(summary, indent=1))


def _intervals(values: list[list[float]]) -> list[list[float]]:
    """Mean over documents and half of its interval, for each part. values: [documents, parts]."""
    mean, half = interval(torch.tensor(values, dtype=torch.float64))
    return [[float(m), float(h)] for m, h in zip(mean, half, strict=True)]


if __name__ == "__main__":
    main()
