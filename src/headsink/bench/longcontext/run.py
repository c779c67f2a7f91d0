"""Run a long-context suite: every engine answers the same prompts, and costs are measured on the way. `run` returns:

    [{"task": "niah_single_2", "length": 4096, "items": 10, "document_tokens": {"median": 3900, "min": 3890, "max": 3912},
      "ways": [
       {"way": "full", "score": 1.0, "score_interval": [low, high],
        "kept": 1.0, "kv_bytes": 360000000,          # of the compressed document: share of the full cache, and mean bytes
        "ttft_s": {"median": ..., "min": ..., "max": ..., "all": [...]},   # reading and compressing, up to the first token
        "tpot_s": {...},                             # later tokens
        "peak_bytes": {...}},                        # peak memory while reading and answering, without weights
       {"way": "0.25", ..., "change": -0.1, "change_interval": [low, high], "p": 0.5}],   # against the full cache, same items
      "records": [{"score": {"full": 1.0, "0.25": 0.9}}, ...],   # needles: "depth" in percent; multiturn: "turn"
      "refused": {"KVzap-linear 0.25": "there are no published weights for this model"}}]

Scores are the harness's; means and 95 % intervals are over items (multiturn: over all turns). Each engine's cache is compared
with the full cache of the same engine. Peak memory is that of the engine's process, or of the GPU, above what it held before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from headsink.bench.checkpoint import Checkpoint
from headsink.bench.longcontext.engines import Engine, Refused
from headsink.bench.longcontext.harness import Record, SuiteModel, evaluate, load_task, make_records
from headsink.bench.tables import UNKNOWN, format_range, sure
from headsink.bench.tables import table as markdown
from headsink.bench.tasks.scoring import interval, p_value
from headsink.bench.tasks.suites import TURNS
from headsink.utils.progress import bar
from headsink.utils.statistics import spread

FULL = "full"  # name of the baseline, which comes first


def run(
    suite: str,
    tokenizer: PreTrainedTokenizerBase,
    engines: Callable[[int], Sequence[Engine]],
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    items: int,
    seed: int,
    chat: bool,
    most: int,
    checkpoints: Path,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Measure engines, the full cache first, on tasks of a suite at every length.

    engines: given a length in tokens. items: prompts of a task; needles for each depth; documents of multiturn. chat: use the
    model's chat format. most: the model's maximum, in tokens. checkpoints: a folder for finished items; settings: what
    they depend on.
    """
    found, refused = [], dict[str, str]()
    for length in lengths:
        usable = engines(length)
        for task in tasks:
            records = make_records(suite, task, tokenizer, items, length, seed, chat=chat, most=most)
            loaded = load_task(suite, task, records)
            done = Checkpoint(checkpoints / f"{task}-{length}.jsonl", settings | {"task": task, "length": length})
            scores, measured = dict[str, list[float]](), dict[str, list[Record]]()
            left = [engine for engine in usable if engine.name not in refused]
            with bar(f"{task} {length}", len(records) * len(left), True) as shown:
                for engine in left:
                    model = SuiteModel(engine, tokenizer, done, chat, lambda: shown.advance(shown.task_ids[0]))
                    try:
                        scores[engine.name] = evaluate(loaded, model, chat)
                    except Refused as error:
                        refused[engine.name] = str(error)
                        continue
                    measured[engine.name] = model.records
            found.append(
                {
                    "task": task,
                    "length": length,
                    "items": len(records),
                    "document_tokens": _range([record["document_tokens"] for record in measured[FULL]]),
                    "ways": [_summary(way, scores, measured, seed) for way in scores],
                    "records": [
                        _where(suite, number, record)
                        | {"score": {way: values[number] for way, values in scores.items()}}
                        for number, record in enumerate(records)
                    ],
                    "refused": dict(refused),
                }
            )
    return found


def _where(suite: str, number: int, record: Record) -> dict[str, int]:
    """Return what tells an item from the others of its task."""
    if suite == "multiturn":
        return {"document": number // TURNS, "turn": number % TURNS + 1}
    return {"depth": record["depth"]} if suite == "needles" else {}


def _summary(way: str, scores: dict[str, list[float]], measured: dict[str, list[Record]], seed: int) -> dict[str, Any]:
    own, records = scores[way], measured[way]
    read = _read(records)
    steps = [step for record in records if (step := record["step_s"]) is not None]
    full = [
        record["full_bytes"] or first["kv_bytes"] for record, first in zip(read, _read(measured[FULL]), strict=True)
    ]
    found: dict[str, Any] = {
        "way": way,
        "score": statistics.fmean(own),
        "score_interval": interval(own, seed),
        "kept": statistics.fmean(record["kv_bytes"] / size for record, size in zip(read, full, strict=True)),
        "kv_bytes": round(statistics.fmean(record["kv_bytes"] for record in read)),
        "ttft_s": spread([record["read_s"] + record["first_s"] for record in read]),
        "tpot_s": spread(steps) if steps else None,
        "peak_bytes": None if None in (peaks := [record["peak_bytes"] for record in read]) else spread(peaks),
    }
    if way != FULL:
        changes = [score - full for score, full in zip(own, scores[FULL], strict=True)]
        found |= {"change": statistics.fmean(changes), "change_interval": interval(changes, seed)}
        found["p"] = p_value(changes, seed)
    return found


def _read(records: list[Record]) -> list[Record]:
    return [record for record in records if "read_s" in record]


def _range(values: list[int]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(results: list[dict[str, Any]]) -> str:
    """Format results as Markdown: scores with a line for each task and length, then what every way costs at each length."""
    ways = list(dict.fromkeys(way["way"] for one in results for way in one["ways"]))
    lines = []
    for one in results:
        cells = {way["way"]: sure(way, "score", ".2f") for way in one["ways"]}
        name = f"{one['task']}, {one['length']:,}"
        lines.append([name, str(one["items"]), *(cells.get(way, "") for way in ways)])
    costs = []
    for length in dict.fromkeys(one["length"] for one in results):
        for way in ways:
            own = [row for one in results if one["length"] == length for row in one["ways"] if row["way"] == way]
            if own:
                costs.append([f"{length:,}", way, *_costs(own)])
    heads = ["length", "", "KV cached", "KV, MB", "TTFT, s", "TPOT, ms", "peak memory, MB"]
    refused = {way: reason for one in results for way, reason in one["refused"].items()}
    notes = [f"{way}: {reason}." for way, reason in refused.items()]
    return "\n\n".join([markdown(["task, length", "items", *ways], lines), markdown(heads, costs), *notes])


def _costs(own: list[dict[str, Any]]) -> list[str]:
    """Bytes and times over the tasks of a length."""
    times = [
        format_range(spread([one for row in own if row[key] for one in row[key]["all"]]), *form)
        if any(row[key] for row in own)
        else UNKNOWN
        for key, form in (("ttft_s", (1, 2)), ("tpot_s", (1e3, 1)))
    ]
    peaks = [row["peak_bytes"] for row in own]
    return [
        f"{statistics.fmean(row['kept'] for row in own):.1%}",
        f"{statistics.fmean(row['kv_bytes'] for row in own) / 1e6:.1f}",
        *times,
        UNKNOWN if None in peaks else f"{max(peak['max'] for peak in peaks) / 1e6:,.0f}",
    ]
