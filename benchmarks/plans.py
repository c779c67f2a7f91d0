"""Quality of plans on held-out cases: headsink, with context reconstruction and without, and baseline policies.

python benchmarks/plans.py --cases runs/cases.json --out benchmarks/results/plans-smollm2-default.json
python benchmarks/plans.py --cases runs/cases.json --budgets 0.25 --methods all --out benchmarks/results/ablation-smollm2.json

A plan is calibrated at the context of the cases, or comes with the package (--packaged). Like the presses of peers.py, a case is
read in full attention and compressed before any continuation is known; then every continuation is scored on its own.

- "headsink": the default.
- "headsink, reconstruction": the same plan; the case is compressed with context reconstruction.
- "..., int8", "..., k8v4": the same with this `kv_dtype`; "full, int8" keeps every key.

Records have the form of peers.py. Bytes are those of the layers without a sliding window.
"""

from __future__ import annotations

import argparse
import contextlib
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
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

import headsink
from headsink.cache.cache import nbytes
from headsink.calibration.calibrate import Calibration
from headsink.calibration.method import POLICIES, Method
from headsink.errors import HeadsinkError
from headsink.plan.plan import Plan
from headsink.runtime.scoring import continuation_log_probs, read
from headsink.utils.files import write_text

SCHEMA = 2  # of the records; in those without, "headsink" is online eviction (leaderboard.py)
RECONSTRUCTION, QUANTIZED = "headsink, reconstruction", ("int8", "k8v4")
METHODS = {
    "headsink": Method(),
    RECONSTRUCTION: Method(),
    **{f"{name}, {kv_dtype}": Method() for name in ("headsink", RECONSTRUCTION, "full") for kv_dtype in QUANTIZED},
    "without top-k keys": Method(top_k=False),
    "equal head budgets": Method(importance=False),
    **{policy: Method(policy=policy) for policy in POLICIES if policy != "headsink"},
}


class Float32Products(TorchFunctionMode):
    """Linear layers of bfloat16 multiply in float32 and round, as bfloat16 instructions do: 7x faster on a CPU without them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and args[0].dtype == torch.bfloat16:
            return func(*(None if arg is None else arg.float() for arg in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def score(
    model: PreTrainedModel, plan: Plan | None, case: dict[str, Any], method: str = "full"
) -> list[dict[str, Any]]:
    """Return a record for every continuation of a case."""
    reconstruct = method.startswith(RECONSTRUCTION)
    kv_dtype: Any = next((name for name in QUANTIZED if method.endswith(name)), "auto")
    cache = read(model, plan, case["ids"], reconstruct=reconstruct, kv_dtype=kv_dtype)
    windows = [getattr(x, "sliding", None) or isinstance(x, DynamicSlidingWindowLayer) for x in cache.layers]
    compressible = SimpleNamespace(layers=[x for x, own in zip(cache.layers, windows, strict=True) if not own])
    kv_bytes, records = nbytes(compressible), []  # type: ignore[arg-type]
    for part in case["continuations"]:
        log_probs = continuation_log_probs(model, cache, part["ids"], part["scored"])
        targets = torch.tensor(part["ids"][-part["scored"] :], device=log_probs.device)
        nll = -log_probs.gather(1, targets[:, None]).double().mean()
        right = bool((log_probs.argmax(-1) == targets).all())
        records.append(
            {"form": part["form"], "nll": float(nll), "right": right, "scored": part["scored"], "kv_bytes": kv_bytes}
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
    parser.add_argument("--packaged", action="store_true", help="plans of the package, in place of calibration")
    parser.add_argument("--plan", type=Path, help="one plan, in place of calibration; give its budget")
    parser.add_argument(
        "--float32-products", action="store_true", help="of bfloat16 layers, on a CPU without bfloat16 products"
    )
    arguments = parser.parse_args()
    with Float32Products() if arguments.float32_products else contextlib.nullcontext():
        measure(parser, arguments)


def measure(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    methods = list(METHODS) if arguments.methods == "all" else arguments.methods.split(";")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} unknown")
    case_file = json.loads(arguments.cases.read_text(encoding="utf-8"))
    model, tokenizer = headsink.load(case_file["model"], dtype=arguments.dtype)
    contexts = sorted({case["context"] for case in case_file["cases"]})
    if arguments.contexts:
        contexts = [int(context) for context in arguments.contexts.split(",")]
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "what": "plans on held-out cases: NLL, and correct answers after the context was read under the plan",
        "command": "python " + " ".join(sys.argv),
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "model": case_file["model"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "plans": [],
        "records": [],
    }
    for context in contexts:
        cases = [case for case in case_file["cases"] if case["context"] == context][: arguments.limit]
        full_bytes = {}
        for case in cases:
            records = score(model, None, case)
            full_bytes[case["name"]] = records[0]["kv_bytes"]
            _add(found, "full", 1.0, case, records, full_bytes)
        shortest = min(len(case["ids"]) for case in cases)  # so that every case meets the budget
        made: dict[Method, tuple[Calibration, float]] = {}
        for name in methods:
            method = METHODS[name]
            if not name.startswith("full") and method not in made and not arguments.packaged and not arguments.plan:
                start = time.perf_counter()
                calibration = Calibration(model, tokenizer, context=shortest, method=method)
                made = {method: (calibration, time.perf_counter() - start)}  # of one method at a time
            calibration, reading_seconds = made.get(method, (None, 0.0))
            everything = Plan.full(model) if name.startswith("full") else None
            for budget in [1.0] if everything else [float(budget) for budget in arguments.budgets.split(",")]:
                start = time.perf_counter()
                try:
                    if everything is not None:
                        plan = everything
                    elif arguments.plan:
                        plan = Plan.load(arguments.plan)
                    elif calibration is None:
                        plan = headsink.packaged_plan(case_file["model"], budget, shortest)
                    else:
                        plan = calibration.plan(budget)
                except HeadsinkError as error:
                    found["plans"].append({"method": name, "budget": budget, "context": context, "refused": str(error)})
                    continue
                seconds = time.perf_counter() - start
                settings = {"method": name, "budget": budget, "context": context, "seconds": seconds + reading_seconds}
                found["plans"].append(settings | {"patterns": plan.counts(), "calibration": plan.calibration})
                for case in cases:
                    _add(found, name, budget, case, score(model, plan, case, name), full_bytes)
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
        identity = {"method": method, "budget": budget, "context": case["context"], "case": case["name"]}
        found["records"].append(identity | record | {"kv_bytes_full": full[case["name"]]})


def _summary(found: dict[str, Any], method: str, budget: float, context: int) -> str:
    """Summarise the NLL of text and answers, the correct answers and the KV bytes, with those of the full cache."""

    def totals(name: str, share: float) -> tuple[float, float, int, float]:
        records = [r for r in found["records"] if (r["method"], r["budget"], r["context"]) == (name, share, context)]
        text, answers = ([r for r in records if (r["form"] == "text") is is_text] for is_text in (True, False))
        mean = [sum(r["nll"] for r in part) / len(part) for part in (text, answers)]
        kept = sum(r["kv_bytes"] for r in records) / sum(r["kv_bytes_full"] for r in records)
        return mean[0], mean[1], sum(r["right"] for r in answers), kept

    full, plan = totals("full", 1.0), totals(method, budget)
    return (
        f"NLL of text {plan[0]:.4f} ({plan[0] - full[0]:+.4f}), of answers {plan[1]:.3f} (full {full[1]:.3f}), correct {plan[2]} "
        f"(full {full[2]}), KV bytes {plan[3]:.3f} of the full cache"
    )


if __name__ == "__main__":
    main()
