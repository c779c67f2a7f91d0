"""What plans cost on tasks: the model itself and every plan answer the same prompts greedily, through the caches that users run.

The model itself is the plan that keeps everything, through the same kernels as the others: what differs is the plan. A prompt is
read once by each way, into a cache, from which it generates; over a copy of the cache it is given what the model itself
generated, which shows how far its distributions are from the model's along the very same text. `run` gives:

    {"task": "gsm8k", "metric": "exact", "higher_is_better": true, "context": 2000, "seed": 0, "items": 30,
     "prompt_tokens": {"median": 1790.0, "min": 1702, "max": 1808},   # of the prompts
     "new_tokens": {"median": 70.0, "min": 31, "max": 192, "limit": 192},   # of what the model itself answered
     "ways": [
      {"way": "full", "kept": 1.0, "score": 0.4, "score_interval": [low, high], "also": {}},
      {"way": "0.25",                       # the name of the plan
       "kept": 0.26,                        # bytes that its cache held at the end, of the full cache's; mean
       "score": 0.37, "score_interval": [low, high],
       "also": {},                          # means of other scores; of squad, hotpotqa, qasper: {"exact": ..., "contains": ...}
       "change": -0.03, "change_interval": [low, high],   # of the score, from the model itself on the same items
       "p": 0.5,                            # of no change (scoring.p_value)
       "same_output": 0.6, "same_output_interval": [low, high],   # share of items with the same text, up to the first stop
       "same_tokens": 0.8, "same_tokens_interval": [low, high],   # share of the model's tokens before the first that differs
       "kl": 0.01, "kl_interval": [low, high]}],   # KL(full || plan), nats a token, along the model's own output
     "records": [
      {"item": "GSM8K/12", "prompt_tokens": 1790, "new_tokens": 70, "score": {"full": 1.0, "0.25": 0.0},
       "also": {"full": {}, "0.25": {}}, "kept": {"0.25": 0.26}, "same_output": {"0.25": false},
       "same_tokens": {"0.25": 0.31}, "kl": {"0.25": 0.02}}]}

Means are over items, each counting the same; so are intervals (scoring.py), 95 %. Of perplexity kl is along the text that is
scored. What was generated is in the checkpoint and nowhere else: it may quote the data sets.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria

from headsink.bench.tasks.scoring import cut, interval, p_value
from headsink.bench.tasks.tasks import NLL, SAME, TASKS, Item, Task
from headsink.bench.tasks.tasks import task as find_task
from headsink.errors import HeadsinkError
from headsink.generation.generate import generate
from headsink.models.devices import dtype_name
from headsink.models.fingerprint import Fingerprint
from headsink.plan.plan import Plan
from headsink.runtime.prefill import prefill
from headsink.runtime.scoring import branch_log_probs
from headsink.utils.files import check_file, read_text, write_text
from headsink.utils.progress import bar

__all__ = ["TASKS", "run", "table"]

FULL = "full"  # the way that is the model itself
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
    checkpoint: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure plans on a task.

    Parameters
    ----------
    task : one of `TASKS`.
    plans : by the names that they have in the result.
    items : how many prompts; of more, the first are the same.
    context : tokens of prompt and answer together, which the plans should be made for.
    checkpoint : a file that keeps every item done; a run with the same settings goes on from there, and may have more items.
    progress : show a bar on standard error.
    """
    if items < 1:
        raise HeadsinkError(f"items: {items} is none")
    if FULL in plans:
        raise HeadsinkError(f"plan: {FULL!r} is the name of the model itself; give the plan another")
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    if context > longest:
        raise HeadsinkError(f"context: {context} is over the model's maximum of {longest}")
    chosen = find_task(task)
    for plan in plans.values():
        plan.check(model)
    done = _Done(checkpoint, _settings(model, task, plans, context, seed))
    ways = {FULL: Plan.full(model)} | {
        way: plan.model_copy(update={"quality": ()})  # measured here, so nothing to warn of
        for way, plan in plans.items()
    }
    records = []
    with bar(task, items, progress) as shown:
        for item in chosen.items(tokenizer, items, context, seed):
            if item.name not in done.records:
                done.add(_measure(model, tokenizer, chosen, item, ways))
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
        "ways": [_summed(way, records, seed) for way in ways],
        "records": [{key: value for key, value in record.items() if key != "output"} for record in records],
    }


# one item


class _Stops(StoppingCriteria):
    """Ends a text once a stop stands in what comes after the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, stops: Sequence[str]):
        self.tokenizer, self.prompt_tokens, self.stops = tokenizer, prompt_tokens, stops

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_tokens :])
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


class _Answer(NamedTuple):
    """What a way generated, with its stop and without; the bytes that its cache held; log-probabilities along a given text."""

    ids: list[int]
    text: str
    kv_bytes: int
    log_probs: Tensor  # float32 [tokens, vocabulary]


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, item: Item, ways: Mapping[str, Plan]
) -> Record:
    ids = item.ids
    if item.follow is not None:
        ids = item.follow(_answer(model, tokenizer, task, ways[FULL], ids).text.strip())
    full = _answer(model, tokenizer, task, ways[FULL], ids, item.target)
    along = item.target or full.ids
    record: Record = {"item": item.name, "prompt_tokens": len(ids), "new_tokens": len(full.ids)}
    for way, plan in ways.items():
        own = full if way == FULL else _answer(model, tokenizer, task, plan, ids, along)
        scores, same = item.score(own.text), _same(own.ids, full.ids) / len(full.ids)
        if task.metric == SAME:
            scores = {SAME: same}
        elif task.metric == NLL:
            targets = torch.tensor(along, device=model.device)
            scores = {NLL: -float(own.log_probs.gather(1, targets[:, None]).double().mean())}
        found: Record = {"score": scores.pop(task.metric), "also": scores, "output": own.text}
        if way != FULL:
            kl = (full.log_probs.exp() * (full.log_probs - own.log_probs)).sum(-1).clamp(min=0)
            found |= {"kept": own.kv_bytes / full.kv_bytes, "same_output": own.text == full.text}
            found |= {"same_tokens": same, "kl": float(kl.double().mean())}
        for key, value in found.items():
            record.setdefault(key, {})[way] = value
    return record


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    plan: Plan,
    ids: list[int],
    along: list[int] | None = None,
) -> _Answer:
    """Read a prompt once and answer it. along: the text for the log-probabilities, the answer itself if not given."""
    cache = prefill(model, plan, torch.tensor([ids[:-1]], device=model.device), exact=False)
    again = copy.deepcopy(cache)
    done = generate(
        model,
        tokenizer,
        ids,
        plan,
        cache=cache,
        max_new_tokens=task.new_tokens,
        stopping_criteria=[_Stops(tokenizer, len(ids), task.stops)],
    )
    again.activate_past_recording()
    along = along or done.ids
    log_probs = branch_log_probs(model, again, [ids[-1], *along], len(along))
    return _Answer(done.ids, cut(done.text, task.stops), done.kv_bytes, log_probs)


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# all items


def _summed(way: str, records: Sequence[Record], seed: int) -> dict[str, Any]:
    def of(key: str, name: str = way) -> list[float]:
        return [float(record[key][name]) for record in records]

    def sure(key: str, values: list[float]) -> dict[str, Any]:
        return {key: statistics.fmean(values), f"{key}_interval": interval(values, seed)}

    found: dict[str, Any] = {"way": way, "kept": 1.0 if way == FULL else statistics.fmean(of("kept"))}
    found |= sure("score", of("score"))
    others = records[0]["also"][way]
    found["also"] = {key: statistics.fmean(record["also"][way][key] for record in records) for key in others}
    if way != FULL:
        changes = [own - full for own, full in zip(of("score"), of("score", FULL), strict=True)]
        found |= sure("change", changes) | {"p": p_value(changes, seed)}
        for key in ("same_output", "same_tokens", "kl"):
            found |= sure(key, of(key))
    return found


def _spread(values: list[int]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(found: dict[str, Any]) -> str:
    """The results of a task, a line for each way."""
    prompts, better = found["prompt_tokens"], "higher" if found["higher_is_better"] else "lower"
    lines = [
        f"{found['task']}, {found['items']} items, prompts of {prompts['min']} to {prompts['max']} tokens; "
        f"{found['metric']}, {better} is better"
    ]
    for way in found["ways"]:
        low, high = way["score_interval"]
        line = f"  {way['way']:<12} keeps {way['kept']:6.1%}; {way['score']:.3f} ({low:.3f} to {high:.3f})"
        if way["way"] != FULL:
            low, high = way["change_interval"]
            line += (
                f", change {way['change']:+.3f} ({low:+.3f} to {high:+.3f}), p {way['p']:.2g}; "
                f"same output {way['same_output']:.0%}, same tokens {way['same_tokens']:.0%}, KL {way['kl']:.4f}"
            )
        lines.append(line)
    return "\n".join(lines)


# what is done


def _settings(model: PreTrainedModel, task: str, plans: Mapping[str, Plan], context: int, seed: int) -> dict[str, Any]:
    return {
        "task": task,
        "context": context,
        "seed": seed,
        "model": Fingerprint.of(model).weights,
        "dtype": dtype_name(model.dtype),
        "device": model.device.type,
        "plans": {way: hashlib.sha256(plan.to_json().encode()).hexdigest() for way, plan in plans.items()},
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
    }


class _Done:
    """Records of items, kept in a file of JSON lines; the first has the settings."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path, self.records = path, dict[str, Record]()
        if path is None:
            return
        check_file(path, force=True)  # what is in it is checked below
        lines = read_text(path).split("\n")[:-1] if path.exists() else []  # a line that a stop cut off has no end
        try:
            found = [dict(json.loads(line)) for line in lines]
            self.records = {record["item"]: record for record in found[1:]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise HeadsinkError(f"{path}: not a checkpoint of headsink; remove it") from error
        for key, value in settings.items() if found else ():
            if found[0].get(key) != value:
                raise HeadsinkError(f"{path}: it is of a run with another {key}; remove it, or write elsewhere")
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in [settings, *self.records.values()]))

    def add(self, record: Record) -> None:
        self.records[record["item"]] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(record)}\n")
