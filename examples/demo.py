"""Demo of the Python interface on the built-in model: analyse, calibrate a plan, answer a question, compare two runs.

python examples/demo.py [--out runs/demo] [--model smollm2]

Takes about 6 minutes on 2 cores. All printed numbers are measured during the run; all files are written under --out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import headsink
from headsink.calibration.verification import figures
from headsink.cli.analyze_output import print_census
from headsink.cli.compare import print_comparison
from headsink.cli.output import generated_json
from headsink.cli.plan import print_plan
from headsink.data import corpus
from headsink.generation.generate import Generation, generate
from headsink.plan.plan import Plan
from headsink.report.comparison import write_comparison
from headsink.utils.files import write_text

LENGTHS = (256, 1024, 2048)
BUDGET = 0.25
DOCUMENT_TOKENS = 2000
CODE = "48213"
NEEDLE = f"Note: the locker in the hall opens with {CODE}."
QUESTION = "Question: Which number opens the locker?\nAnswer: The locker in the hall opens with"

console = Console(soft_wrap=True)


def document(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make a prompt of about `DOCUMENT_TOKENS` tokens: held-out prose with the needle after a third, then the question."""
    prose = tokenizer.decode(corpus.tokens("prose", tokenizer, DOCUMENT_TOKENS - 40, seed=7, split="heldout"))
    paragraphs = prose.split("\n\n")
    paragraphs.insert(len(paragraphs) // 3, NEEDLE)
    return list(tokenizer("\n\n".join([*paragraphs, QUESTION]))["input_ids"])


def answer_both(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> list[tuple[str, Generation]]:
    """Answer the same question with the full cache and under the plan."""
    ids = document(tokenizer)
    generate(
        model, tokenizer, ids[:200], max_new_tokens=4
    )  # warm-up, so that the first call's overhead is not measured
    results = []
    for name, applied in (("full", None), (f"plan, {BUDGET:.0%}", plan)):
        console.print(f"\n[bold]{name}[/bold]")
        done = generate(model, tokenizer, ids, applied, max_new_tokens=32, show=lambda text: console.out(text, end=""))
        console.print()
        results.append((name, done))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    out, start = arguments.out, time.perf_counter()

    console.rule("1. Load")
    model, tokenizer = headsink.load(arguments.model)
    console.print(
        f"{arguments.model}: {model.num_parameters() / 1e6:.0f} million parameters, {model.dtype}", highlight=False
    )

    console.rule("2. Attention statistics of every head")
    census = headsink.analyze(model, tokenizer, lengths=LENGTHS, texts_per_domain=1)
    headsink.write_report(census, out / "census")
    print_census(console, census)

    console.rule(f"3. A plan that keeps {BUDGET:.0%} of the KV cache at {DOCUMENT_TOKENS} tokens")
    plan = headsink.calibrate(model, tokenizer, budget=BUDGET, context=DOCUMENT_TOKENS, quality_contexts=())
    plan.save(out / "plan.json")
    print_plan(console, plan)
    console.print(f"On the calibration documents: {figures(plan.calibration['verified'])}.", highlight=False)

    console.rule(f"4. A question about a document of {DOCUMENT_TOKENS} tokens")
    console.print(f"The document says, a third of the way in: {NEEDLE}\nThe question: {QUESTION}", highlight=False)
    results = answer_both(model, tokenizer, plan)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "answer", "prompt tokens", "time to first token", "ms per token", "KV cache"):
        table.add_column(column)
    for name, done in results:
        per_token = f"{1000 * done.token_s:.1f}" if done.token_s else "-"
        kv = f"{done.kv_bytes / 1e6:.1f} MB"
        right = "right" if done.text.strip().startswith(CODE) else "wrong"
        table.add_row(name, right, str(done.prompt_tokens), f"{done.first_token_s:.1f} s", per_token, kv)
    console.print(table)
    write_text(
        out / "answers.json",
        json.dumps({name: generated_json(done) for name, done in results}, indent=1) + "\n",
        force=True,  # of an earlier demo
    )

    console.rule("5. Compare two runs: other texts of the same domains")
    other = headsink.analyze(model, tokenizer, lengths=LENGTHS[:2], texts_per_domain=1, seed=1)
    headsink.write_report(other, out / "census-seed1")
    comparison = headsink.compare(out / "census", out / "census-seed1")
    write_comparison(comparison, out / "comparison.html")
    print_comparison(console, comparison)

    console.rule()
    console.print(f"Done in {(time.perf_counter() - start) / 60:.1f} minutes. Results:", highlight=False)
    for path in (
        "census/report.html",
        f"census/figure-roles-{LENGTHS[-1]}.png",
        "plan.json",
        "answers.json",
        "comparison.html",
    ):
        console.print(f"  {out / path}", highlight=False)


if __name__ == "__main__":
    main()
