"""Make the held-out cases for plans.py and peers.py: documents, each with following text and questions as continuations.

python benchmarks/cases.py --out runs/cases.json

A case's document is read and compressed before any continuation is known; then every continuation is scored on its own.
Documents come from the held-out half of the corpus, with held-out question forms and other seeds than calibration and a plan's
measured quality use. With --split calibration they come from the other half, for choices that held-out cases must not make.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import headsink
from headsink.data import corpus
from headsink.data import documents as probes
from headsink.models import loading
from headsink.utils.files import write_text

SEED = 1000


def cases(
    tokenizer: PreTrainedTokenizerBase, documents: dict[int, int], split: corpus.Split = "heldout"
) -> list[dict[str, Any]]:
    """Make cases. documents: number of documents of each domain, by context in tokens.

    The last `scored` tokens of a continuation are scored: all but the first of following text, the answer of a question.
    """
    made = []
    for context, count in documents.items():
        for number in range(count):
            for domain in corpus.DOMAINS:
                document = probes.document(tokenizer, context, split=split, seed=SEED + number, domains=(domain,))
                continuations = [
                    {"form": form, "ids": ids, "scored": scored} for form, ids, scored in document.continuations
                ]
                name = f"{domain}-{number}"
                made.append({"context": context, "name": name, "ids": document.ids, "continuations": continuations})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", default="2000,6000")
    parser.add_argument("--documents", default="2,1", help="number for each domain, at each context")
    parser.add_argument("--split", default="heldout", choices=("heldout", "calibration"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    _, tokenizer = headsink.load(arguments.model)
    contexts, counts = ([int(n) for n in text.split(",")] for text in (arguments.contexts, arguments.documents))
    found = {
        "headsink": version("headsink"),
        "model": arguments.model,
        "split": arguments.split,
        "folder": loading.find(arguments.model)[0],
        "cases": cases(tokenizer, dict(zip(contexts, counts, strict=True)), arguments.split),
    }
    write_text(arguments.out, json.dumps(found))
    print(f"{len(found['cases'])} cases -> {arguments.out}")


if __name__ == "__main__":
    main()
