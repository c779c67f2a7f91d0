"""SpeculativeDecoder mode against decoding in full, several texts at once: milliseconds for a token of every text.

python benchmarks/lossless.py --plan runs/plan-7500.json --out benchmarks/results/lossless-smollm2.json

Different held-out texts are read once. Then, in turn, from copies of the cache: the model itself by transformers, the model under
the all-full plan (all texts in one pass), the compiled step, and lossless mode with drafts of 2, 4 and 8 tokens, and of as many
as pay. Greedy, the same tokens; where lossless text parts from the model's own it is counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import headsink
from headsink import Plan
from headsink.bench.heading import heading
from headsink.cache.cache import PlanCache
from headsink.data import corpus
from headsink.generation.decode import decoding, prepare
from headsink.generation.speculative import Speculation, SpeculativeDecoder, kept
from headsink.models.transformers_names import cache_argument
from headsink.utils.files import write_text
from headsink.utils.statistics import spread

DRAFTS: tuple[int | None, ...] = (2, 4, 8, None)


def passes(model: PreTrainedModel, cache: Any, last: Tensor, tokens: int) -> Tensor:
    """Greedy tokens by passes of the model: int64 [texts, tokens]."""
    found = [last]
    for _ in range(tokens):
        logits = model(found[-1], **cache_argument(cache), use_cache=True).logits
        found.append(logits[:, -1:].argmax(-1))
    return torch.cat(found[1:], 1)


def compiled(model: PreTrainedModel, cache: PlanCache, last: Tensor, tokens: int) -> Tensor:
    """The same by the compiled step."""
    found = [last[:, 0]]
    with decoding(model, cache) as step:
        for _ in range(tokens):
            found.append(step.run(found[-1]).argmax(-1))
    return torch.stack(found[1:], 1)


def lossless(
    model: PreTrainedModel,
    full: PlanCache,
    draft: PlanCache,
    ids: Tensor,
    tokens: int,
    drafted: int | None,
    told: Speculation,
) -> Tensor:
    """The same by lossless mode."""
    length = ids.shape[1] + tokens
    place = torch.full((len(ids),), ids.shape[1] - 1)

    def stop(text: Tensor, _: Any) -> Tensor:
        return torch.tensor([text.shape[1] >= length])

    state = SpeculativeDecoder(model, ids, place, full, draft)
    state.run(lambda _, logits: logits, stop, sample=False, drafted=drafted, told=told)
    return torch.stack(state.texts)[:, ids.shape[1] :]


def unrecorded(cache: PlanCache) -> PlanCache:
    """A copy that the compiled step takes."""
    one = copy.deepcopy(cache)
    for layer in one.layers:
        layer.record_past = False  # type: ignore[attr-defined]
    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plan", type=Path, required=True, help="what drafts")
    parser.add_argument("--context", type=int, default=7500)
    parser.add_argument("--batches", default="1,8", help="how many texts at once")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = headsink.load(arguments.model, dtype=arguments.dtype)
    plan, everything = Plan.load(arguments.plan).model_copy(update={"quality": ()}), Plan.full(model)
    prepare(model)
    found: dict[str, Any] = heading("seconds for a token of every text, greedy, in full and in lossless mode") | {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "context": arguments.context,
        "kept": plan.kept(arguments.context),
        "tokens": arguments.tokens,
        "results": [],
    }
    for batch in map(int, arguments.batches.split(",")):
        texts = [
            corpus.tokens(("prose", "code")[n % 2], tokenizer, arguments.context, seed=n, split="heldout")
            for n in range(batch)
        ]
        ids = torch.tensor(texts)
        full = headsink.new_cache(model, everything, exact=False)
        with torch.no_grad(), headsink.apply(model, everything):
            for start in range(0, arguments.context - 1, 1024):
                chunk = ids[:, start : min(start + 1024, arguments.context - 1)]
                model(chunk, **cache_argument(full), use_cache=True, logits_to_keep=1)
        draft, last = kept(model, plan, full), ids[:, -1:]
        told: dict[str, Speculation] = {}

        def own_cache(full: PlanCache = full) -> DynamicCache:
            cache = DynamicCache(config=model.config)
            for index, layer in enumerate(full.layers):
                cache.update(*(t.clone() for t in layer.groups[0].last(layer.seen)), index)  # type: ignore[attr-defined]
            return cache

        def with_draft(
            count: int | None,
            full: PlanCache = full,
            draft: PlanCache = draft,
            told: dict[str, Speculation] = told,
            ids: Tensor = ids,
        ) -> tuple[Callable[[], tuple[Any, ...]], Callable[..., Tensor]]:
            told[str(count)] = Speculation()
            return (
                lambda: (copy.deepcopy(full), copy.deepcopy(draft)),
                lambda *pair: lossless(model, *pair, ids, arguments.tokens, count, told[str(count)]),
            )

        ways: dict[str, tuple[Callable[[], tuple[Any, ...]], Callable[..., Tensor]]] = {
            "transformers": (lambda: (own_cache(),), lambda c, last=last: passes(model, c, last, arguments.tokens)),
            "headsink, full": (
                lambda full=full: (copy.deepcopy(full),),
                lambda c, last=last: passes(model, c, last, arguments.tokens),
            ),
            "headsink, full, compiled": (
                lambda full=full: (unrecorded(full),),
                lambda c, last=last: compiled(model, c, last, arguments.tokens),
            ),
        } | {f"lossless, drafts of {count or 'as many as pay'}": with_draft(count) for count in DRAFTS}
        times: dict[str, list[float]] = {way: [] for way in ways}
        said: dict[str, Tensor] = {}
        for number in range(arguments.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                prepared, run = ways[way]
                caches = prepared()
                start = time.perf_counter()
                with torch.no_grad():
                    if way == "transformers":
                        said[way] = run(*caches)
                    else:
                        with headsink.apply(model, everything):
                            said[way] = run(*caches)
                times[way].append((time.perf_counter() - start) / arguments.tokens)
                print(f"{batch} texts, {way}: {1e3 * times[way][-1]:.1f} ms", file=sys.stderr)
        best = min(sorted(times[way])[arguments.rounds // 2] for way in list(ways)[1:3])
        for way in ways:
            row: dict[str, Any] = {"texts": batch, "way": way, "token_s": spread(times[way])}
            row["ratio_to_own_full"] = best / row["token_s"]["median"]
            row["texts_that_part"] = int((said[way] != said["headsink, full"]).any(1).sum())
            if way.startswith("lossless"):
                one = told[way.removeprefix("lossless, drafts of ").replace("as many as pay", "None")]
                row |= {"acceptance": one.acceptance, "passes": one.passes / arguments.rounds, "lengths": one.lengths}
            found["results"].append(row)
        write_text(arguments.out, json.dumps(found, indent=1))
    for row in found["results"]:
        print(row["texts"], row["way"], f"{1e3 * row['token_s']['median']:.1f} ms, {row['ratio_to_own_full']:.2f} x")
    print(f"-> {arguments.out}")


if __name__ == "__main__":
    main()
