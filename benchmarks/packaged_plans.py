"""Make the plans that come with the package (src/headsink/plan/packaged), with their quality on held-out text.

python benchmarks/packaged_plans.py
"""

from __future__ import annotations

import argparse

import headsink
from headsink.calibration.frontier import frontier
from headsink.plan.packaged import packaged_file

BUDGETS = (0.125, 0.25, 0.5)
CONTEXTS = (2000, 6000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    model_name = parser.parse_args().model
    model, tokenizer = headsink.load(model_name, dtype="float32", device="cpu")
    for context in CONTEXTS:
        for plan in frontier(model, tokenizer, context=context, budgets=BUDGETS).plans:
            print(plan.save(packaged_file(model_name, context, plan.calibration["budget"])), repr(plan), sep="\n")


if __name__ == "__main__":
    main()
