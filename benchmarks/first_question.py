"""The first question on a model: does a head that is a sink in one layer tell of the head of the same number in a later one?

python benchmarks/first_question.py smollm2 --lengths 2,3,4,8,16,24,32,64,128,256,512 --texts 8 --out FILE

One census over all kinds of text; for each length and for each rule of what a sink is: how many heads are sinks, how often a
sink's number is one again in a later layer, what that would be by chance, and the permutation test's p. For the legacy score
also what flat attention would score. Prints the table in Markdown, as in docs/first-question.md; FILE gets everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import headsink
from headsink import corpus
from headsink.census import Census
from headsink.census.transfer import RULES
from headsink.files import write_text
from headsink.report.page import p_value, share


def answers(census: Census) -> list[dict[str, Any]]:
    """One record per kind of text (all together first), length and rule."""
    return [
        {
            "domain": domain or "all texts",
            "length": length,
            "flat_legacy": float(census.score("uniform_legacy", length, domain).mean()),
            **found.to_dict(),
        }
        for domain in (None, *census.domains)
        for length in census.lengths
        for found in census.first_question(length, domain)
    ]


def table(rows: list[dict[str, Any]], rules: list[str]) -> str:
    """Markdown, a line per length: for each rule the share of sinks; rate, chance and p from any layer; the same from layer 0."""
    heads = ["tokens", "flat legacy"]
    for rule in rules:
        heads += [f"{rule}: sinks", "sink again", "chance", "p", "from layer 0", "chance", "p"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for length in dict.fromkeys(row["length"] for row in rows):
        cells = [str(length)]
        for rule in rules:
            (row,) = (r for r in rows if (r["domain"], r["length"], r["rule"]) == ("all texts", length, rule))
            cells += [f"{row['flat_legacy']:.2f}"] if len(cells) == 1 else []
            cells += [share(row["rate"]), share(row["pair_rate"]), share(row["pair_chance"]), p_value(row["pair_p"])]
            cells += [share(row["first_rate"]), share(row["first_chance"]), p_value(row["first_p"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", default="2,3,4,8,16,24,32,64,128,256,512")
    parser.add_argument("--domains", default=",".join(corpus.CENSUS_DOMAINS))
    parser.add_argument("--texts", type=int, default=8, help="texts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=None, help="folder to go on from, if stopped")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = headsink.load(arguments.model)
    census = headsink.analyze(
        model,
        tokenizer,
        lengths=[int(n) for n in arguments.lengths.split(",")],
        domains=arguments.domains.split(","),
        texts_per_domain=arguments.texts,
        seed=arguments.seed,
        checkpoint=arguments.checkpoint,
    )
    rows = answers(census)
    result = {
        "command": "python " + " ".join(sys.argv),
        "settings": {key: value for key, value in census.settings.items() if key != "own_texts"},
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
        "answers": rows,
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    rules = list(RULES)
    print(table(rows, rules[:1]), table(rows, rules[1:2]), table(rows, rules[2:]), sep="\n\n")


if __name__ == "__main__":
    main()
