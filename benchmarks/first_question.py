"""Test the first question on a model: does a sink head of one layer predict the head of the same number in a later layer?

headsink analyze smollm2 --lengths 2,3,4,8,16,24,32,64,128,256,512 --texts-per-domain 8 --out runs/short
headsink analyze smollm2 --lengths 1024,2048,4096,8192 --texts-per-domain 1 --out runs/long
python benchmarks/first_question.py runs/short runs/long --out benchmarks/results/first-question-smollm2.json

For each length and each definition of a sink: the share of sinks, how often a sink's number is a sink again in a later layer, the
chance value of that, and p of the permutation test; for the legacy score also what uniform attention would score. Prints Markdown
tables; the JSON has every domain too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from headsink.census.first_layer import RULES
from headsink.census.results import Census
from headsink.utils.files import write_text
from headsink.utils.format import p_value, share


def answers(census: Census) -> list[dict[str, Any]]:
    """Return one record per domain (all texts together first), length and definition of a sink."""
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


def table(rows: list[dict[str, Any]], rule: str) -> str:
    """Format a Markdown table, a line per length: share of sinks; rate, chance and p for all layer pairs, and from layer 0."""
    titles = [
        "tokens",
        "flat legacy",
        "sinks",
        "sink again",
        "chance",
        "p",
        "in layer 0",
        "from layer 0",
        "chance",
        "p",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        if (row["domain"], row["rule"]) == ("all texts", rule):
            cells = [str(row["length"]), f"{row['flat_legacy']:.2f}", share(row["rate"])]
            cells += [share(row["pair_rate"]), share(row["pair_chance"]), p_value(row["pair_p"])]
            cells += [
                share(row["first_layer_rate"]),
                share(row["first_rate"]),
                share(row["first_chance"]),
                p_value(row["first_p"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="census folders of different lengths")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs = [Census.load(folder) for folder in arguments.runs]
    rows = [row for census in runs for row in answers(census)]
    result = {
        "command": "python " + " ".join(sys.argv),
        "settings": [{key: value for key, value in run.settings.items() if key != "own_texts"} for run in runs],
        "answers": rows,
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    for rule in RULES:
        print(f"{rule}\n\n{table(rows, rule)}\n")


if __name__ == "__main__":
    main()
