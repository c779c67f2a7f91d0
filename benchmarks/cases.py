"""Held-out cases that plans and peers are judged on: documents, each with the text that follows and questions.

python benchmarks/cases.py --out runs/cases.json

A case is read first and compressed before any of its continuations is known; every continuation is then scored by itself.
Documents come from the held-out half of the corpus and have held-out forms of questions, with seeds of their own: neither
calibration nor a plan's own quality sees them.
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


def cases(tokenizer: PreTrainedTokenizerBase, documents: dict[int, int]) -> list[dict[str, Any]]:
    """Context -> documents of each kind of text.

    A continuation's last `scored` tokens are scored: all but the first of a text, the answer of a question.
    """
    made = []
    for context, count in documents.items():
        for number in range(count):
            for domain in corpus.DOMAINS:
                document = probes.document(tokenizer, context, split="heldout", seed=SEED + number, domains=(domain,))
                branches = [{"form": form, "ids": ids, "scored": scored} for form, ids, scored in document.branches]
                name = f"{domain}-{number}"
                made.append({"context": context, "name": name, "ids": document.ids, "continuations": branches})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", default="2000,6000")
    parser.add_argument("--documents", default="2,1", help="of each kind of text, at each context")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    _, tokenizer = headsink.load(arguments.model)
    contexts, counts = ([int(n) for n in text.split(",")] for text in (arguments.contexts, arguments.documents))
    found = {
        "headsink": version("headsink"),
        "model": arguments.model,
        "folder": loading.find(arguments.model)[0],
        "cases": cases(tokenizer, dict(zip(contexts, counts, strict=True))),
    }
    write_text(arguments.out, json.dumps(found))
    print(f"{len(found['cases'])} cases -> {arguments.out}")


if __name__ == "__main__":
    main()
