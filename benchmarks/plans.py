"""Plans on the held-out cases that peers are judged on: ours, the policies of other methods, ours with parts turned off.

python benchmarks/plans.py --cases runs/cases.json --out benchmarks/results/plans-smollm2.json
python benchmarks/plans.py --cases runs/cases.json --budgets 0.25 --methods all --out benchmarks/results/ablation-smollm2.json

A plan is calibrated at the context of the cases. Their continuations are not known while a case is read; each is scored by itself
after that. "headsink" reads under the plan and goes on letting keys go while continuations run. "headsink, once" does as the
presses of peers.py do: the case is read in full, compressed once, and all that follows stays; "headsink, retold" tells it again
in between (where heads are many, its numbers of keys are by need only anyway). Records have the form of peers.py; bytes are
those of layers that do not slide by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

import headsink
from headsink.cache.cache import nbytes
from headsink.calibration.calibrate import Calibration
from headsink.calibration.method import Method
from headsink.errors import HeadsinkError
from headsink.plan.plan import Plan
from headsink.runtime.scoring import branch_log_probs, read
from headsink.utils.files import write_text

POLICIES = {
    policy: Method(policy=policy) for policy in ("streaming-llm", "random", "copy-first-layer", "layer-wise", "on-off")
}
PARTS = {
    "without top-k keys": Method(top_k=(0.0,), windows=(32, 128, 512)),
    "one number of top-k keys": Method(top_k=(0.0, 1 / 8)),
    "squared errors, not slopes": Method(gradient=False),
    "one step": Method(steps=False, refine=False),
    "without a start by need": Method(need=False),
    "without correction": Method(correction=False),
    "without swaps": Method(refine=False),
    "without questions": Method(retrieval_weight=0.0),
}
RETOLD_PARTS = {
    "retold, values as they are": Method(prefill_compression=True, reconstruct=True, refit_values=False),
    "retold, equal numbers": Method(prefill_compression=True, reconstruct=True, need=False, refine=False),
    "retold, numbers by need only": Method(prefill_compression=True, reconstruct=True, refine=False),
}
METHODS = {
    "headsink": Method(),
    "headsink, once": Method(prefill_compression=True),
    "headsink, retold": Method(prefill_compression=True, reconstruct=True),
    **POLICIES,
    **PARTS,
    **RETOLD_PARTS,
}


def score(model: PreTrainedModel, plan: Plan | None, case: dict[str, Any]) -> list[dict[str, Any]]:
    """A record of every continuation of a case."""
    cache = read(model, plan, case["ids"])
    governed = SimpleNamespace(layers=[x for x in cache.layers if not isinstance(x, DynamicSlidingWindowLayer)])
    held, records = nbytes(governed), []  # type: ignore[arg-type]
    for part in case["continuations"]:
        log_probs = branch_log_probs(model, cache, part["ids"], part["scored"])
        targets = torch.tensor(part["ids"][-part["scored"] :], device=log_probs.device)
        nll = -log_probs.gather(1, targets[:, None]).double().mean()
        right = bool((log_probs.argmax(-1) == targets).all())
        records.append(
            {"form": part["form"], "nll": float(nll), "right": right, "scored": part["scored"], "kv_bytes": held}
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="from benchmarks/cases.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", default="0.5,0.25,0.125")
    parser.add_argument("--methods", default="headsink", help=f"'all', or some of: {'; '.join(METHODS)}")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--limit", type=int, help="cases of each context")
    parser.add_argument("--contexts", help="only cases of these contexts")
    arguments = parser.parse_args()
    methods = list(METHODS) if arguments.methods == "all" else arguments.methods.split(";")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} unknown")
    listed = json.loads(arguments.cases.read_text(encoding="utf-8"))
    model, tokenizer = headsink.load(listed["model"], dtype=arguments.dtype)
    contexts = sorted({case["context"] for case in listed["cases"]})
    if arguments.contexts:
        contexts = [int(context) for context in arguments.contexts.split(",")]
    found: dict[str, Any] = {
        "what": "plans on held-out cases: nll and answers once the context is read under the plan",
        "command": "python " + " ".join(sys.argv),
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "model": listed["model"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "plans": [],
        "records": [],
    }
    for context in contexts:
        cases = [case for case in listed["cases"] if case["context"] == context][: arguments.limit]
        full_bytes = {}
        for case in cases:
            records = score(model, None, case)
            full_bytes[case["name"]] = records[0]["kv_bytes"]
            _add(found, "full", 1.0, case, records, full_bytes)
        start = time.perf_counter()
        shortest = min(len(case["ids"]) for case in cases)  # so that the budget holds for every case
        calibration = Calibration(model, tokenizer, context=shortest)
        reading = time.perf_counter() - start
        for name in methods:
            calibration.method = METHODS[name]
            for budget in (float(budget) for budget in arguments.budgets.split(",")):
                start = time.perf_counter()
                try:
                    plan = calibration.plan(budget)
                except HeadsinkError as error:
                    found["plans"].append({"method": name, "budget": budget, "context": context, "refused": str(error)})
                    continue
                seconds = time.perf_counter() - start
                described = {"method": name, "budget": budget, "context": context, "seconds": seconds + reading}
                found["plans"].append(described | {"patterns": plan.counts(), "calibration": plan.calibration})
                for case in cases:
                    _add(found, name, budget, case, score(model, plan, case), full_bytes)
                write_text(arguments.out, json.dumps(found, indent=1))
                print(
                    f"{context} {name} {budget}: {seconds:.0f} s, {_summary(found, name, budget, context)}",
                    file=sys.stderr,
                )
    print(f"-> {arguments.out}")


def _add(
    found: dict[str, Any],
    method: str,
    budget: float,
    case: dict[str, Any],
    records: list[dict[str, Any]],
    full: dict[str, int],
) -> None:
    for record in records:
        place = {"method": method, "budget": budget, "context": case["context"], "case": case["name"]}
        found["records"].append(place | record | {"kv_bytes_full": full[case["name"]]})


def _summary(found: dict[str, Any], method: str, budget: float, context: int) -> str:
    """nll of text and answers and answers right, beside the model itself."""

    def of(name: str, share: float) -> tuple[float, float, int, float]:
        records = [r for r in found["records"] if (r["method"], r["budget"], r["context"]) == (name, share, context)]
        text, asked = ([r for r in records if (r["form"] == "text") is is_text] for is_text in (True, False))
        mean = [sum(r["nll"] for r in part) / len(part) for part in (text, asked)]
        kept = sum(r["kv_bytes"] for r in records) / sum(r["kv_bytes_full"] for r in records)
        return mean[0], mean[1], sum(r["right"] for r in asked), kept

    full, plan = of("full", 1.0), of(method, budget)
    return (
        f"nll of text {plan[0]:.4f} ({plan[0] - full[0]:+.4f}), of answers {plan[1]:.3f} (full {full[1]:.3f}), right {plan[2]} "
        f"(full {full[2]}), bytes {plan[3]:.3f}"
    )


if __name__ == "__main__":
    main()
