"""`headsink bench domains`: do domains need plans of their own (bench/domains.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import headsink
from headsink.bench.options import check_families
from headsink.cli.bench.shared import OutFile, deliver
from headsink.cli.options import Force, Model, RunOptions, Seed, names
from headsink.data.domains import KINDS
from headsink.utils.files import check_file
from headsink.utils.terminal import resumable


@dataclass(frozen=True)
class DomainsOptions(RunOptions):
    """Options of `headsink bench domains`."""

    model: Model = "smollm2"
    context: Annotated[int, typer.Option(help="Tokens of texts and documents.")] = 2000
    budget: Annotated[float, typer.Option(help="Fraction of the KV cache that all plans keep.")] = 0.25
    kinds: Annotated[str, typer.Option("--domains", help=f"Domains, separated by commas: {', '.join(KINDS)}.")] = (
        ",".join(KINDS)
    )
    documents: Annotated[int, typer.Option(help="Held-out documents of each kind that plans are tested on.")] = 4
    texts: Annotated[int, typer.Option(help="Texts of each kind in the census: 4, 6, ...")] = 6
    checkpoint: Annotated[
        Path, typer.Option(help="Folder for the plans and for what is done; the same options go on from there.")
    ] = Path("runs/domains")
    out_file: OutFile = None
    seed: Seed = 0
    force: Force = False


def domains(options: DomainsOptions) -> None:
    """Whether prose, code, maths, chat and questions need plans of their own: a census of each, and plans made on one and tested
    on the others.

    Takes 1 to 2 hours on 2 cores.
    """
    if options.out_file is not None:
        check_file(options.out_file, options.force)
    chosen = check_families(names(options.kinds), options.documents, options.texts, options.budget)

    from headsink.bench.domains import run

    model, tokenizer = headsink.load(options.model, dtype=options.dtype, device=options.device)
    with resumable(options.checkpoint):
        result = run(
            model,
            tokenizer,
            context=options.context,
            budget=options.budget,
            families=chosen,
            documents=options.documents,
            texts=options.texts,
            seed=options.seed,
            checkpoint=options.checkpoint,
        )
    deliver(result, table(result), options.out_file, options.force, options.as_json)


def table(result: dict[str, Any]) -> str:
    """The matrix of KLs and what one's own plan is worth, in a few lines."""
    from headsink.bench.domain_plans import DEFAULT

    kinds = result["families"]
    lines = [
        f"KL of text (nats a token), {result['model']}, {result['context']} tokens, budget {result['budget']:g}",
        "calibrated on" + "".join(f"{kind:>12}" for kind in kinds) + "   <- tested on",
    ]
    cells = {(cell["calibrated_on"], cell["tested_on"]): cell for cell in result["cells"]}
    for name in (DEFAULT, *kinds):
        lines.append(f"{name:13}" + "".join(f"{cells[name, kind]['kl']:12.4f}" for kind in kinds))
    lines.append("correct answers, plan / full cache")
    for name in (DEFAULT, *kinds):
        row = (cells[name, kind] for kind in kinds)
        lines.append(f"{name:13}" + "".join(f"{cell['right']:>7} / {cell['right_full']:<2}" for cell in row))
    own, (low, high) = result["own"]["kl"], result["own"]["interval"]
    lines.append(f"another family's plan costs {own:+.4f} ({low:+.4f} to {high:+.4f}) beyond a family's own")
    same, other = (
        [pair for pair in result["census"]["pairs"] if _is_one(pair["families"]) is one] for one in (True, False)
    )
    for what, pairs in (("two halves of one domain", same), ("two domains", other)):
        share = sum(pair["scores"]["far"]["beyond_chance"] for pair in pairs) / len(pairs)
        role = sum(pair["other_role"] for pair in pairs) / len(pairs)
        lines.append(f"heads that differ between {what}: {share:.0%} in attention to what is far, {role:.0%} in role")
    same, other = ([pair for pair in result["agreement"] if _is_one(pair["plans"]) is one] for one in (True, False))
    moved = [sum(pair["moved"] for pair in pairs) / len(pairs) for pairs in (same, other)]
    lines.append(f"keys that go to other heads: {moved[0]:.0%} between two plans of a family, {moved[1]:.0%} of two")
    return "\n".join(lines)


def _is_one(names: list[str]) -> bool:
    return names[0] == names[1]
