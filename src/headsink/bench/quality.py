"""Quality of plans on tasks: the full cache and every plan answer the same prompts greedily.

The baseline is the plan that keeps every key, on the same kernels, so that only the plan differs. Each plan reads a prompt once
and generates from its cache. A copy of the cache then scores the full cache's output, teacher-forced, for the KL divergence along
the same text. `run` returns:

    {"task": "gsm8k", "metric": "exact", "higher_is_better": true, "context": 2000, "seed": 0, "items": 30,
     "prompt_tokens": {"median": 1790.0, "min": 1702, "max": 1808},
     "new_tokens": {"median": 70.0, "min": 31, "max": 192, "limit": 192},   # of the full cache's answers
     "ways": [
      {"way": "full", "kept": 1.0, "score": 0.4, "score_interval": [low, high]},
      {"way": "0.25",                       # name of the plan
       "kept": 0.26,                        # cache bytes at the end / bytes of the full cache; mean
       "score": 0.37, "score_interval": [low, high],
       "change": -0.03, "change_interval": [low, high],   # of the score against the full cache, on the same items
       "p": 0.5,                            # of the hypothesis of no change (scoring.p_value)
       "same_output": 0.6, "same_output_interval": [low, high],   # share of items with the same text, up to the first stop
       "same_tokens": 0.8, "same_tokens_interval": [low, high],   # share of the full cache's tokens before the first difference
       "kl": 0.01, "kl_interval": [low, high]}],   # KL(full || plan), nats per token, along the full cache's output
     "records": [
      {"item": "GSM8K/12", "prompt_tokens": 1790, "new_tokens": 70, "score": {"full": 1.0, "0.25": 0.0},
       "kept": {"0.25": 0.26}, "same_output": {"0.25": false},
       "same_tokens": {"0.25": 0.31}, "kl": {"0.25": 0.02}}]}

Means and 95 % intervals (tasks/scoring.py) are over items, with equal weights. For perplexity, kl is along the scored text.
Generated text is stored in the checkpoint only, because it may quote the data sets.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.attention.formats import KVDtype
from headsink.bench.checkpoint import Checkpoint, run_settings
from headsink.bench.stops import Stops
from headsink.bench.tasks.scoring import cut, interval, p_value
from headsink.bench.tasks.tasks import SAME, TASKS, Item, Task
from headsink.bench.tasks.tasks import task as find_task
from headsink.errors import HeadsinkError
from headsink.generation.generate import generate
from headsink.models.distributed import input_device
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.runtime.prefill import empty_cache, prefill
from headsink.runtime.scoring import continuation_log_probs
from headsink.utils.progress import bar

__all__ = ["TASKS", "run", "table"]

FULL = "full"  # name of the baseline, the full cache
Record = dict[str, Any]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    plans: Mapping[str, Plan],
    *,
    items: int,
    context: int,
    seed: int = 0,
    kv_dtype: KVDtype = "auto",
    checkpoint: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure plans on a task.

    Parameters
    ----------
    task : one of `TASKS`.
    plans : plans by their names in the result.
    items : number of prompts; a larger number begins with the same prompts.
    context : tokens of prompt and answer together; plans should be calibrated for this length.
    kv_dtype : of the caches under plans, as for `headsink.new_cache`; the full cache keeps the model's dtype.
    checkpoint : a file that stores every finished item; a run with the same settings resumes from it, also with more items.
    progress : show a bar on standard error.

    Raises HeadsinkError for invalid options, and for a plan of another model.
    """
    if items < 1:
        raise HeadsinkError(f"items: {items} is too few; give 1 or more")
    if FULL in plans:
        raise HeadsinkError(f"plan: {FULL!r} is the name of the full cache; give the plan another")
    longest = describe(model).max_context
    if context > longest:
        raise HeadsinkError(f"context: {context} is over the model's maximum of {longest}")
    chosen = find_task(task)
    for plan in plans.values():
        plan.check(model)
    done = Checkpoint(checkpoint, run_settings(model, plans, task=task, context=context, seed=seed, kv_dtype=kv_dtype))
    measured = {FULL: Plan.full(model)} | {
        name: plan.model_copy(update={"quality": ()})  # quality is measured here, so no warning about it
        for name, plan in plans.items()
    }
    records = []
    with bar(task, items, progress) as shown:
        for item in chosen.items(tokenizer, items, context, seed):
            if item.name not in done.records:
                done.add(_measure(model, tokenizer, chosen, item, measured, kv_dtype))
            records.append(done.records[item.name])
            shown.advance(shown.task_ids[0])
    return {
        "task": task,
        "metric": chosen.metric,
        "higher_is_better": chosen.higher_is_better,
        "context": context,
        "seed": seed,
        "items": items,
        "prompt_tokens": _spread([record["prompt_tokens"] for record in records]),
        "new_tokens": _spread([record["new_tokens"] for record in records]) | {"limit": chosen.new_tokens},
        "ways": [_summary(name, records, seed) for name in measured],
        "records": [{key: value for key, value in record.items() if key != "output"} for record in records],
    }


# one item


class _Answer(NamedTuple):
    """What a plan generated for one prompt."""

    ids: list[int]  # with the stop string
    text: str  # up to the stop string
    kv_bytes: int  # of the cache at the end
    log_probs: Tensor  # float32 [tokens, vocabulary], along the given text


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    item: Item,
    plans: Mapping[str, Plan],
    kv_dtype: KVDtype,
) -> Record:
    ids = item.ids
    if item.follow is not None:
        ids = item.follow(_answer(model, tokenizer, task, plans[FULL], ids).text.strip())
    full = _answer(model, tokenizer, task, plans[FULL], ids, item.target)
    along = item.target or full.ids
    record: Record = {"item": item.name, "prompt_tokens": len(ids), "new_tokens": len(full.ids)}
    for name, plan in plans.items():
        own = full if name == FULL else _answer(model, tokenizer, task, plan, ids, along, kv_dtype)
        same = _common_prefix(own.ids, full.ids) / len(full.ids)
        if item.score is not None:
            score = item.score(own.text)
        elif task.metric == SAME:
            score = same
        else:
            targets = torch.tensor(along, device=input_device(model))
            score = -float(own.log_probs.gather(1, targets[:, None]).double().mean())
        found: Record = {"score": score, "output": own.text}
        if name != FULL:
            kl = (full.log_probs.exp() * (full.log_probs - own.log_probs)).sum(-1).clamp(min=0)
            found |= {"kept": own.kv_bytes / full.kv_bytes, "same_output": own.text == full.text}
            found |= {"same_tokens": same, "kl": float(kl.double().mean())}
        for key, value in found.items():
            record.setdefault(key, {})[name] = value
    return record


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    plan: Plan,
    ids: list[int],
    along: list[int] | None = None,
    kv_dtype: KVDtype = "auto",
) -> _Answer:
    """Prefill a prompt once and answer it. along: token ids to take log-probabilities along; by default the answer."""
    cache = empty_cache(model, plan, exact=False, kv_dtype=kv_dtype)
    prefill(model, plan, torch.tensor([ids[:-1]], device=input_device(model)), cache=cache)
    scoring_cache = copy.deepcopy(cache)
    done = generate(
        model,
        tokenizer,
        ids,
        plan,
        cache=cache,
        max_new_tokens=task.new_tokens,
        stopping_criteria=[Stops(tokenizer, len(ids), task.stops)],
    )
    scoring_cache.activate_past_recording()
    along = along or done.ids
    log_probs = continuation_log_probs(model, scoring_cache, [ids[-1], *along], len(along))
    return _Answer(done.ids, cut(done.text, task.stops), done.kv_bytes, log_probs)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# all items


def _summary(name: str, records: Sequence[Record], seed: int) -> dict[str, Any]:
    def values_of(key: str, plan: str = name) -> list[float]:
        return [float(record[key][plan]) for record in records]

    def mean(key: str, values: list[float]) -> dict[str, Any]:
        return {key: statistics.fmean(values), f"{key}_interval": interval(values, seed)}

    found: dict[str, Any] = {"way": name, "kept": 1.0 if name == FULL else statistics.fmean(values_of("kept"))}
    found |= mean("score", values_of("score"))
    if name != FULL:
        changes = [own - full for own, full in zip(values_of("score"), values_of("score", FULL), strict=True)]
        found |= mean("change", changes) | {"p": p_value(changes, seed)}
        for key in ("same_output", "same_tokens", "kl"):
            found |= mean(key, values_of(key))
    return found


def _spread(values: list[int]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(found: dict[str, Any]) -> str:
    """Format the results of a task, a line for each plan."""
    prompts, better = found["prompt_tokens"], "higher" if found["higher_is_better"] else "lower"
    lines = [
        f"{found['task']}, {found['items']} items, prompts of {prompts['min']} to {prompts['max']} tokens; "
        f"{found['metric']}, {better} is better"
    ]
    for row in found["ways"]:
        low, high = row["score_interval"]
        line = f"  {row['way']:<12} keeps {row['kept']:6.1%}; {row['score']:.3f} ({low:.3f} to {high:.3f})"
        if row["way"] != FULL:
            low, high = row["change_interval"]
            line += (
                f", change {row['change']:+.3f} ({low:+.3f} to {high:+.3f}), p {row['p']:.2g}; "
                f"same output {row['same_output']:.0%}, same tokens {row['same_tokens']:.0%}, KL {row['kl']:.4f}"
            )
        lines.append(line)
    return "\n".join(lines)
