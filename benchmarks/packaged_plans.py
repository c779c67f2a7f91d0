"""Make the plans that come with the package (src/headsink/plan/packaged), with their quality on held-out text.

python benchmarks/packaged_plans.py
python benchmarks/packaged_plans.py --quality    # measure the plans that are there again
"""

from __future__ import annotations

import argparse

import headsink
from headsink.calibration.frontier import frontier
from headsink.evaluation.quality import measure_each
from headsink.plan.packaged import packaged_file
from headsink.plan.plan import Plan

BUDGETS = (0.125, 0.25, 0.5)
CONTEXTS = (2000, 6000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quality", action="store_true", help="keep the plans, and measure their quality again")
    arguments = parser.parse_args()
    model_name = arguments.model
    model, tokenizer = headsink.load(model_name, dtype="float32", device="cpu")
    for context in CONTEXTS:
        if arguments.quality:
            plans = [Plan.load(packaged_file(model_name, context, budget)) for budget in BUDGETS]
            pairs = zip(plans, measure_each(model, tokenizer, plans, context), strict=True)
            made = tuple(plan.model_copy(update={"quality": (quality,)}) for plan, quality in pairs)
        else:
            made = frontier(model, tokenizer, context=context, budgets=BUDGETS).plans
        for plan in made:
            print(plan.save(packaged_file(model_name, context, plan.calibration["budget"])), repr(plan), sep="\n")


if __name__ == "__main__":
    main()
