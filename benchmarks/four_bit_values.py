"""Quality of forms of values in 4 bits beside keys in int8, by rounding a bfloat16 cache. `kv_dtype="k8v4"` has groups of 32.

python benchmarks/cases.py --contexts 2000 --documents 2 --split calibration --out runs/cases-calibration.json
python benchmarks/four_bit_values.py --cases runs/cases-calibration.json --out runs/four-bit-values.json
python benchmarks/four_bit_values.py --cases runs/cases.json --forms "int8;symmetric" --block 32 --out runs/heldout.json

A case is read under a plan into a bfloat16 cache. Then every cached key is rounded to int8 and every value to 4 bits, and both
are stored back in bfloat16: the numbers that a packed cache would give to attention. Bytes are those of the packed cache: 4 for
the scale of a key, and 4 for the scale of a group of numbers of a value, or for its scale and zero point in float16. KL is that
of the plan in bfloat16 to the same plan with rounded values, per token of the text that follows the document. Choose a form on
cases of the calibration split.

A continuation is one segment, so its own keys are exact while it is read. --block also reads the text in blocks of so many
tokens, and rounds the new keys and values after each block.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plans import Float32Products
from torch import Tensor
from transformers import Cache, PreTrainedModel

import headsink
from headsink.attention.int8 import SCALE_BYTES, dequantize, quantize
from headsink.bench.heading import provenance
from headsink.cache.cache import nbytes
from headsink.cache.head_group import HeadGroup
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.runtime.scoring import continuation_log_probs, forward, read
from headsink.utils.files import write_text
from headsink.utils.statistics import interval

LARGEST = 7  # of 4 bits, rounded symmetrically
STEPS = 15  # from the least to the largest number of a group, rounded asymmetrically
GROUP_BYTES = 4  # a scale in float32, or a scale and a zero point in float16
LEAST = 2.0**-14  # the least scale in float16
SINK, WINDOW = 4, 32  # tokens of the packaged plans' patterns
BFLOAT16 = "bfloat16"


def int8(numbers: Tensor) -> Tensor:
    """Round [..., dim] as attention/int8.py does."""
    return dequantize(quantize(numbers), numbers.dtype)


def symmetric(values: Tensor) -> Tensor:
    """Round values [..., dim] to 4 bits with one scale each."""
    wide = values.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=LEAST)
    return ((wide / scale).round() * scale).to(values)


def grouped(values: Tensor, size: int) -> Tensor:
    """Round values [..., dim] to 4 bits, with a scale and a zero point in float16 for each `size` numbers of a value."""
    wide = values.float().unflatten(-1, (-1, size))
    zero = wide.amin(-1, keepdim=True).half().float()
    scale = ((wide.amax(-1, keepdim=True) - zero) / STEPS).clamp(min=LEAST).half().float()
    return (((wide - zero) / scale).round().clamp(0, STEPS) * scale + zero).flatten(-2).to(values)


def asymmetric(values: Tensor) -> Tensor:
    return grouped(values, values.shape[-1])


def groups_of_32(values: Tensor) -> Tensor:
    return grouped(values, 32)


class Form(NamedTuple):
    """How values are cached.

    groups: of numbers of one value of 64 numbers, each with a scale. sink, window: the first and last tokens whose values stay in
    int8, and with a window those of new tokens too. share: so do those of heads that keep at most this share of the tokens.
    """

    values: Callable[[Tensor], Tensor]
    groups: int = 1
    sink: int = 0
    window: int = 0
    share: float = 0.0

    def narrow(self, group: HeadGroup, tokens: int) -> Tensor:
        """Which slots of a frozen group have values in 4 bits after a document of `tokens` tokens: bool [slots]."""
        kept = group.prefix_slots if group.prefix_slots else tokens
        slots = torch.arange(group.keys.shape[2])
        chosen = torch.full_like(slots, self.values is not int8 and kept > self.share * tokens, dtype=torch.bool)
        return chosen & (slots >= self.sink) & ((slots < kept - self.window) | (self.window == 0))


FORMS = {
    "int8": Form(int8),
    "symmetric": Form(symmetric),
    "asymmetric": Form(asymmetric),
    "groups of 32": Form(groups_of_32, groups=2),
    "symmetric, sinks in int8": Form(symmetric, sink=SINK),
    "asymmetric, sinks in int8": Form(asymmetric, sink=SINK),
    "asymmetric, sinks and window in int8": Form(asymmetric, sink=SINK, window=WINDOW),
    "groups of 32, sinks in int8": Form(groups_of_32, groups=2, sink=SINK),
    "groups of 32, sinks and window in int8": Form(groups_of_32, groups=2, sink=SINK, window=WINDOW),
    "groups of 32, heads that keep more than half": Form(groups_of_32, groups=2, share=0.5),
}


def cache_groups(cache: Cache) -> list[HeadGroup]:
    return [group for layer in cache.layers for group in layer.groups]


def round_slots(group: HeadGroup, form: Form, tokens: int, slots: slice) -> None:
    """Round the keys and values in some slots of a group, each once."""
    keys, values = group.keys[:, :, slots], group.values[:, :, slots]
    chosen = form.narrow(group, tokens)[slots, None]
    group.keys[:, :, slots] = int8(keys)
    group.values[:, :, slots] = torch.where(chosen, form.values(values), int8(values))


def packed_bytes(cache: Cache, form: Form | None, tokens: int) -> int:
    """Bytes of a bfloat16 cache, with its bookkeeping, if keys and values were packed."""
    size = nbytes(cache)
    for group in cache_groups(cache) if form else []:
        batch, heads, slots, dim = group.keys.shape
        few = int(form.narrow(group, tokens).sum())
        row = (2 * slots - few) * (dim + SCALE_BYTES) + few * (dim // 2 + form.groups * GROUP_BYTES)
        size += batch * heads * row - group.keys.nbytes - group.values.nbytes
    return size


def text_in_blocks(
    model: PreTrainedModel, cache: Cache, ids: list[int], form: Form | None, tokens: int, block: int
) -> Tensor:
    """Log-probabilities after every token but the last of a text, float32 [tokens, vocabulary]. Keys are rounded by block."""
    parts = list[Tensor]()
    for start in range(0, len(ids), block):
        part = ids[start : start + block]
        parts.append(forward(model, cache, part, len(part)).float().log_softmax(-1))
        for group in cache_groups(cache) if form else []:
            end = group.prefix_slots + group.length - group.start
            round_slots(group, form, tokens, slice(end - len(part), end))
    for layer in cache.layers:
        layer.crop(-len(ids))
    return torch.cat(parts)[:-1]


def score(
    model: PreTrainedModel, cache: Cache, case: dict[str, Any], form: Form | None, block: int, base: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Return a record for every continuation of a case that was read into a bfloat16 cache, which stays as it is.

    base: log-probabilities of texts with the same plan in bfloat16; filled if it is empty.
    """
    tokens, groups = len(case["ids"]), [] if form is None else cache_groups(cache)
    exact = [(group.keys.clone(), group.values.clone()) for group in groups]
    for group in groups:
        round_slots(group, form, tokens, slice(0, group.keys.shape[2]))
    texts, records = dict[str, Tensor](), []
    for part in case["continuations"]:
        found = {part["form"]: continuation_log_probs(model, cache, part["ids"], part["scored"])}
        if part["form"] == "text":
            if block:
                found["text in blocks"] = text_in_blocks(model, cache, part["ids"], form, tokens, block)
            texts = found
        targets = torch.tensor(part["ids"][-part["scored"] :])
        for question, log_probs in found.items():
            nll = float(-log_probs.gather(1, targets[:, None]).double().mean())
            right = bool((log_probs.argmax(-1) == targets).all())
            records.append({"question": question, "nll": nll, "right": right})
            if question in texts:
                before = base.setdefault(question, log_probs)
                records[-1]["kl"] = float((before.exp() * (before - log_probs)).sum(-1).double().mean())
    for group, (keys, values) in zip(groups, exact, strict=True):
        slots = slice(0, keys.shape[2])  # the buffers may have grown
        group.keys[:, :, slots], group.values[:, :, slots] = keys, values
    return records


def summary(records: list[dict[str, Any]], budget: float, form: str) -> dict[str, Any]:
    """Compare a form with the same plan in bfloat16, and with the full cache if budget 1 was measured.

    KL and differences of NLL are means over cases with half of their 95 % interval.
    """
    full, plan, own = (
        {(r["case"], r["question"]): r for r in records if (r["budget"], r["form"]) == which}
        for which in ((1.0, BFLOAT16), (budget, BFLOAT16), (budget, form))
    )
    found: dict[str, Any] = {"budget": budget, "form": form}
    for question in sorted({question for _, question in own if question.startswith("text")}):
        ours = {key: record for key, record in own.items() if key[1] == question}
        for name, changes in {
            f"delta NLL to the plan, {question}": [r["nll"] - plan[key]["nll"] for key, r in ours.items()],
            f"delta NLL, {question}": [r["nll"] - full[key]["nll"] for key, r in ours.items() if full],
            f"KL, {question}": [r["kl"] for r in ours.values()],
        }.items():
            if changes:
                found[name] = [round(float(x), 5) for x in interval(torch.tensor(changes))]
    for name, base in (("answers of the plan", plan), ("answers", full)):
        right = [key for key, r in base.items() if r["right"] and not key[1].startswith("text")]
        found[name] = [sum(own[key]["right"] for key in right), len(right)]
    found["kv_bytes"] = sum(r["kv_bytes"] for r in own.values()) / sum(r["kv_bytes_full"] for r in own.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="from benchmarks/cases.py")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--budgets", default="1,0.25", help="1: every key, in bfloat16 the full cache")
    parser.add_argument("--forms", default=";".join(FORMS), help="separated by ';'")
    parser.add_argument("--block", type=int, default=0, help="also read the text in blocks of this many tokens")
    parser.add_argument("--float32-products", action="store_true", help="as in plans.py")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    forms = arguments.forms.split(";")
    if unknown := set(forms) - set(FORMS):
        parser.error(f"--forms: {', '.join(sorted(unknown))} unknown")
    budgets = [float(budget) for budget in arguments.budgets.split(",")]
    case_file = json.loads(arguments.cases.read_text(encoding="utf-8"))
    cases = [case for case in case_file["cases"] if case["context"] == arguments.context]
    model, _ = headsink.load(case_file["model"], dtype="bfloat16", device="cpu")
    token_bytes = sum(2 * kv_heads * dim * model.dtype.itemsize for _, kv_heads, dim in describe(model).heads)
    shortest = min(len(case["ids"]) for case in cases)
    records: list[dict[str, Any]] = []
    result = provenance("cached values in 4 bits and keys in int8: NLL and answers against the same plan in bfloat16")
    result |= {"model": case_file["model"], "split": case_file["split"], "context": arguments.context}
    for budget in budgets:
        packaged = headsink.packaged_plan(case_file["model"], budget, shortest) if budget < 1 else None
        for case in cases:
            identity = {"budget": budget, "case": case["name"], "kv_bytes_full": token_bytes * len(case["ids"])}
            base = dict[str, Tensor]()
            with Float32Products() if arguments.float32_products else contextlib.nullcontext():
                for plan, names in ((packaged, [BFLOAT16]), (packaged or Plan.full(model), forms)):
                    cache = read(model, plan, case["ids"])
                    sizes = {name: packed_bytes(cache, FORMS.get(name), len(case["ids"])) for name in names}
                    for name in names:
                        about = identity | {"form": name, "kv_bytes": sizes[name]}
                        for record in score(model, cache, case, FORMS.get(name), arguments.block, base):
                            records.append(about | record)
            print(f"{budget} {case['name']}", file=sys.stderr, flush=True)
        rows = [summary(records, b, name) for b in budgets[: budgets.index(budget) + 1] for name in (BFLOAT16, *forms)]
        write_text(arguments.out, json.dumps(result | {"summary": rows, "records": records}, indent=1))
        for row in rows[-len(forms) - 1 :]:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
