"""TPOT of lossless mode on a CPU against decoding with the full cache, for one sequence or several at once.

python benchmarks/lossless.py --plan runs/plan-7500.json --out benchmarks/results/lossless-smollm2.json
python benchmarks/lossless.py --plan runs/plan-7500.json --dtype float32 --batches 1 --tokens 128 --drafts pays \
    --tasks summary,edit,chat --out benchmarks/results/lossless-tasks-smollm2.json

Different held-out texts are read once, or a document with an instruction (`TASKS`). Then these decode greedily, alternately, from
copies of the cache: transformers with the full cache; the model under the all-full plan; the compiled decode step under that
plan; lossless mode with drafts of 2, 4 and 8 tokens of the compressed cache, and as it chooses itself from the text ("pays").
Sequences whose tokens differ from those of the full cache, and from those of the compiled step, are counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import headsink
from headsink import Plan
from headsink.bench.heading import provenance
from headsink.cache.cache import PlanCache
from headsink.data import corpus
from headsink.decoding.step import open_decoder, prepare
from headsink.generation.lookup import LookupDecoder
from headsink.generation.sequences import Speculation
from headsink.generation.speculative import SpeculativeDecoder, draft_cache
from headsink.generation.templates import document_prompt, question_prompt
from headsink.models.transformers_names import cache_argument
from headsink.utils.files import write_text
from headsink.utils.statistics import spread

PAYS = "pays"
TASKS = {  # kind of document, and the instruction after it
    "continue": ("", ""),
    "summary": ("prose", "Summarise the text above."),
    "edit": ("code", "Write the code above again, with a comment for every function."),
    "chat": ("chat", "Go on with this conversation."),
}


def make_prompt(task: str, tokenizer: PreTrainedTokenizerBase, context: int, number: int) -> list[int]:
    kind, instruction = TASKS[task]
    if not kind:
        return corpus.tokens(("prose", "code")[number % 2], tokenizer, context, seed=number, split="heldout")
    before, start = document_prompt(tokenizer, "")
    end = question_prompt(tokenizer, before, instruction)
    document = corpus.tokens(kind, tokenizer, context - len(start) - len(end), seed=number, split="heldout")
    return [*start, *document, *end]


def passes(model: PreTrainedModel, cache: Any, last: Tensor, tokens: int) -> Tensor:
    """Decode greedily by forward passes of the model: int64 [batch, tokens]."""
    found = [last]
    for _ in range(tokens):
        logits = model(found[-1], **cache_argument(cache), use_cache=True).logits
        found.append(logits[:, -1:].argmax(-1))
    return torch.cat(found[1:], 1)


def compiled(model: PreTrainedModel, cache: PlanCache, last: Tensor, tokens: int) -> Tensor:
    """Decode greedily by the compiled decode step: int64 [batch, tokens]."""
    found = [last[:, 0]]
    with open_decoder(model, cache) as step:
        for _ in range(tokens):
            found.append(step.run(found[-1]).to(model.dtype).float().argmax(-1))  # rounded as the model's logits
    return torch.stack(found[1:], 1)


def lossless(
    model: PreTrainedModel,
    full: PlanCache,
    draft: PlanCache | None,
    ids: Tensor,
    tokens: int,
    drafted: int | None,
    counts: Speculation,
) -> Tensor:
    """Decode greedily in lossless mode: int64 [batch, tokens]. draft: None to draft from the text. The run adds to `counts`."""
    length = ids.shape[1] + tokens
    positions = torch.full((len(ids),), ids.shape[1] - 1)

    def stop(text: Tensor, _: Any) -> Tensor:
        return torch.tensor([text.shape[1] >= length])

    def logits_of(_: int, ids: Tensor, logits: Tensor) -> Tensor:
        return logits

    state: LookupDecoder | SpeculativeDecoder
    if draft is None:
        state = LookupDecoder(model, ids, positions, full)
        state.run(logits_of, stop, sample=False, told=counts)
    else:
        state = SpeculativeDecoder(model, ids, positions, full, draft)
        state.run(logits_of, stop, sample=False, drafted=drafted, told=counts)
    return torch.stack(state.texts)[:, ids.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plan", type=Path, required=True, help="the plan of the draft")
    parser.add_argument("--context", type=int, default=7500)
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    parser.add_argument("--tasks", default="continue", help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--drafts", default=f"2,4,8,{PAYS}", help="drafted tokens of lossless mode")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = headsink.load(arguments.model, dtype=arguments.dtype)
    plan, everything = Plan.load(arguments.plan).model_copy(update={"quality": ()}), Plan.full(model)
    prepare(model)
    found: dict[str, Any] = provenance(
        "seconds for a token of every sequence, greedy, with the full cache and in lossless mode"
    ) | {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "context": arguments.context,
        "kept": plan.kv_budget(arguments.context),
        "tokens": arguments.tokens,
        "results": [],
    }
    drafts = [None if count == PAYS else int(count) for count in arguments.drafts.split(",")]
    for task, batch in product(arguments.tasks.split(","), map(int, arguments.batches.split(","))):
        ids = torch.tensor([make_prompt(task, tokenizer, arguments.context, n) for n in range(batch)])
        full = headsink.new_cache(model, everything, exact=False)
        with torch.no_grad(), headsink.apply(model, everything):
            for start in range(0, arguments.context - 1, 1024):
                chunk = ids[:, start : min(start + 1024, arguments.context - 1)]
                model(chunk, **cache_argument(full), use_cache=True, logits_to_keep=1)
        last, recording = ids[:, -1:], copy.deepcopy(full)
        draft = draft_cache(model, plan, recording)
        counts: dict[str, Speculation] = {}

        def transformers_cache(full: PlanCache = full) -> DynamicCache:
            cache = DynamicCache(config=model.config)
            for index, layer in enumerate(full.layers):
                cache.update(*(t.clone() for t in layer.groups[0].last(layer.seen)), index)  # type: ignore[attr-defined]
            return cache

        def with_draft(
            count: int | None,
            full: PlanCache = full,
            recording: PlanCache = recording,
            draft: PlanCache = draft,
            counts: dict[str, Speculation] = counts,
            ids: Tensor = ids,
        ) -> tuple[Callable[[], tuple[Any, ...]], Callable[..., Tensor]]:
            counts[str(count)] = Speculation()
            return (
                lambda: (
                    (copy.deepcopy(full), None) if count is None else (copy.deepcopy(recording), copy.deepcopy(draft))
                ),
                lambda *pair: lossless(model, *pair, ids, arguments.tokens, count, counts[str(count)]),
            )

        methods: dict[str, tuple[Callable[[], tuple[Any, ...]], Callable[..., Tensor]]] = {
            "transformers": (
                lambda: (transformers_cache(),),
                lambda c, last=last: passes(model, c, last, arguments.tokens),
            ),
            "headsink, full": (
                lambda full=full: (copy.deepcopy(full),),
                lambda c, last=last: passes(model, c, last, arguments.tokens),
            ),
            "headsink, full, compiled": (
                lambda full=full: (copy.deepcopy(full),),
                lambda c, last=last: compiled(model, c, last, arguments.tokens),
            ),
        } | {f"lossless, drafts of {count or 'as many as pay'}": with_draft(count) for count in drafts}
        times: dict[str, list[float]] = {method: [] for method in methods}
        outputs: dict[str, Tensor] = {}
        for number in range(arguments.rounds):
            for method in methods if number % 2 == 0 else reversed(methods):
                make_caches, run = methods[method]
                caches = make_caches()
                start = time.perf_counter()
                with torch.no_grad():
                    if method == "transformers":
                        outputs[method] = run(*caches)
                    else:
                        with headsink.apply(model, everything, compiled=False):
                            outputs[method] = run(*caches)
                times[method].append((time.perf_counter() - start) / arguments.tokens)
                print(f"{task}, {batch} sequences, {method}: {1e3 * times[method][-1]:.1f} ms", file=sys.stderr)
        best = min(sorted(times[method])[arguments.rounds // 2] for method in list(methods)[1:3])
        for method in methods:
            row: dict[str, Any] = {"task": task, "texts": batch, "way": method, "token_s": spread(times[method])}
            row["ratio_to_own_full"] = best / row["token_s"]["median"]
            for name, other in (
                ("texts_that_part", "headsink, full"),
                ("texts_that_part_from_step", "headsink, full, compiled"),
            ):
                row[name] = int((outputs[method] != outputs[other]).any(1).sum())
            if method.startswith("lossless"):
                one = counts[method.removeprefix("lossless, drafts of ").replace("as many as pay", "None")]
                row |= {"acceptance": one.acceptance, "passes": one.passes / arguments.rounds, "lengths": one.lengths}
            found["results"].append(row)
        write_text(arguments.out, json.dumps(found, indent=1))
    for row in found["results"]:
        print(
            row["task"],
            row["texts"],
            row["way"],
            f"{1e3 * row['token_s']['median']:.1f} ms, {row['ratio_to_own_full']:.2f} x",
        )
    print(f"-> {arguments.out}")


if __name__ == "__main__":
    main()
