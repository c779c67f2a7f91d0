"""`headsink bench all`: every measurement of the results page as rows in a folder, one after the other, resumable.

The plans of a model come first, whatever else is asked for: those that come with the package, and calibrated ones where there is
none (bench/plans.py). Then what they cost on tasks (quality.py) and in long-context suites (longcontext), what kinds of prompts
differ in (families.py), and, once for every context and batch, speed and memory. Plans are for one context. For speed and memory
at another one they are scaled (`Plan.scale`). How long a plan runs depends on how many keys each head keeps, not on which keys
they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import headsink
from headsink.bench import domains, memory, quality, speed
from headsink.bench.checkpoint import run_settings
from headsink.bench.comparison import Comparison
from headsink.bench.options import Options, label
from headsink.bench.peers import process
from headsink.bench.plans import packaged_plans, plans_of_budgets
from headsink.bench.suite import records
from headsink.bench.suite.records import Compared, Row
from headsink.bench.tasks.suites import SUITES, check_lengths, check_tasks, items_of
from headsink.errors import HeadsinkError
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.utils.files import remove, sha256
from headsink.utils.progress import console

SPEED_DTYPE = "bfloat16"  # of speed and memory, unless a dtype is given: what one would serve in
MEMORY_ROUNDS = 2  # peaks hardly differ
# typical seconds of a row on 2 cores, for a token of its context; ITEM for each item too
PLAN, FAMILIES, ITEM = 0.5, 4.5, 0.01
SUITE = 0.002  # of a suite's row, for a token of its context, an item and a column
PACKAGED = 5  # seconds of a row of packaged plans: the model is loaded
STARTED = {"speed": (60, 0.09), "memory": (200, 0.03)}  # seconds to start, and for a token of all texts


def rows_of(options: Options, folder: Path) -> Iterator[Row]:
    """All rows, those of plans first. Settings tell plans by their contents, so take a row when its plans are made."""
    for model in options.models:
        yield from _quality_rows(options, folder, model)
    for model in options.models:
        for context in options.contexts:
            for batch in options.batches:
                yield from _cost_rows(options, folder, model, context, batch)


def run(options: Options, folder: Path, only: Sequence[str] = ()) -> dict[str, str]:
    """Measure the rows whose names match one of the patterns (all, if there are none) and that are not there. States by names."""
    process.check(options.llama_cpp, options.vllm)
    wanted = select_rows(options, folder, only)
    left = {row.name: row.typical for row in wanted}
    for name in left:
        row = next(row for row in rows_of(options, folder) if row.name == name)  # now that its plans are made
        done = records.read_rows(folder)
        if records.state(row, done) == "measured":
            continue
        console.print(
            f"[{list(left).index(name) + 1}/{len(left)}] {name}: {_time_left(wanted, done, name)}", highlight=False
        )
        record = records.measure(row, records.checkpoint_of(folder, row), options.device)
        if "missing" not in record or "found" not in done.get(name, {}):
            records.save(folder, record)
        if "missing" in record:
            console.print(f"  not measured: {record['missing']}", highlight=False, markup=False)
    return states(options, folder, only)


def select_rows(options: Options, folder: Path, only: Sequence[str]) -> list[Row]:
    """Rows whose names match, and the plans that they need. Raises HeadsinkError if there are none."""
    everything = list(rows_of(options, folder))
    named = [row for row in everything if not only or any(fnmatchcase(row.name, pattern) for pattern in only)]
    if not named:
        raise HeadsinkError(f"only: no row is called {' or '.join(only)}; headsink bench all --list tells their names")
    models = {row.name.split("/")[1] for row in named}
    return [row for row in everything if row in named or row.name in {f"plan/{model}" for model in models}]


def states(options: Options, folder: Path, only: Sequence[str]) -> dict[str, str]:
    """The state of every row that matches, by its name."""
    done = records.read_rows(folder)
    return {row.name: records.state(row, done) for row in select_rows(options, folder, only)}


def again(options: Options, folder: Path, name: str) -> list[Compared]:
    """Measure a row of a folder again, as its settings say, and compare every figure (rows.py). The folder stays as it is.

    options: for the model's place, device and peers.
    """
    path = records.file_of(folder, name)
    if not path.is_file():
        raise HeadsinkError(f"row: {name} is not in {folder}; headsink bench all --out {folder} --list tells what is")
    before = records.read_row(path)
    known = {field.name for field in fields(Options)} & before["settings"].keys() - {"models"}
    settings: dict[str, Any] = {key: tuple(v) if isinstance(v := before["settings"][key], list) else v for key in known}
    options = replace(options, **settings)
    with TemporaryDirectory() as temporary:
        made = Path(temporary) if name.startswith("plan/") else folder
        row = next((row for row in rows_of(options, made) if row.name == name), None)
        if row is None:
            raise HeadsinkError(f"row: {name} is of a model that --models does not name")
        return records.compare(before, records.measure(row, Path(temporary) / "row.partial", options.device))


def plan_file(options: Options, folder: Path, model: str, budget: float) -> Path:
    return folder / "plans" / f"{label(model)}-{options.context}-{budget}.json"


def _quality_rows(options: Options, folder: Path, model: str) -> Iterator[Row]:
    name, command_line = label(model), options.command_line()
    common = {"model": name, **options.of("context", "budgets", "seed", "dtype")}
    packaged = packaged_plans(model, options.budgets, options.context)
    settings = common | (
        {"packaged": {str(budget): _digest(plan) for budget, plan in packaged.items()}} if packaged else {}
    )
    typical = PACKAGED if len(packaged) == len(options.budgets) else PLAN * options.context
    yield Row(f"plan/{name}", settings, partial(_plan, options, folder, model), typical, command_line)
    hashes = _hashes(options, folder, model)
    for task in options.tasks:
        settings = {**common, "tasks": [task], "items": options.items, "plans": hashes}
        measure = partial(_quality, options, folder, model, task)
        yield Row(f"quality/{name}/{task}", settings, measure, ITEM * options.context * options.items, command_line)
    for suite in options.suites:
        settings = {**common, "suites": [suite], "items": options.items, "plans": hashes}
        typical = SUITE * options.context * options.items * (1 + 2 * len(options.budgets))
        for task in SUITES[suite].tasks:
            measure = partial(_suite, options, folder, model, suite, task)
            yield Row(f"suite/{name}/{suite}/{task}", settings, measure, typical, command_line)
    settings = {**common, **options.of("budget", "families", "documents", "texts")}
    yield Row(
        f"families/{name}", settings, partial(_families, options, model), FAMILIES * options.context, command_line
    )


def _cost_rows(options: Options, folder: Path, model: str, context: int, batch: int) -> Iterator[Row]:
    name = f"{label(model)}/{context}x{batch}"
    settings = {"model": label(model), **options.of("context", "budgets", "seed", "dtype", "tokens", "rounds")}
    settings |= {"contexts": [context], "batches": [batch], "plans": _hashes(options, folder, model)}
    settings |= {"peers": [peer for peer in ("llama_cpp", "vllm") if getattr(options, peer)]}
    for kind, measure in (("speed", _speed), ("memory", _memory)):
        first, token = STARTED[kind]
        measured = partial(measure, options, folder, model, context, batch)
        yield Row(f"{kind}/{name}", settings, measured, first + token * context * batch, options.command_line())


def _hashes(options: Options, folder: Path, model: str) -> dict[str, str]:
    files = {str(budget): plan_file(options, folder, model, budget) for budget in options.budgets}
    return {budget: sha256(file)[:12] for budget, file in files.items() if file.is_file()}


def _digest(plan: Plan) -> str:
    """The hash of the plan's file."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()[:12]


def _plans(options: Options, folder: Path, model: str) -> dict[str, Plan]:
    files = {budget: plan_file(options, folder, model, budget) for budget in options.budgets}
    if absent := [file for file in files.values() if not file.is_file()]:
        raise HeadsinkError(f"plans/{absent[0].name} is not there: its row plan/{label(model)} was not measured")
    return {str(budget): Plan.load(file) for budget, file in files.items()}


@lru_cache(maxsize=1)
def _load(model: str, dtype: str | None, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return headsink.load(model, dtype=dtype, device=device)


def _plan(options: Options, folder: Path, model: str, checkpoint: Path) -> dict[str, Any]:
    loaded, tokenizer = _load(model, options.dtype, options.device)
    files = {budget: plan_file(options, folder, model, budget) for budget in options.budgets}
    settings: dict[str, Any] = {"context": options.context, "seed": options.seed, "checkpoint": checkpoint}
    plans = plans_of_budgets(model, loaded, tokenizer, files, **settings)
    found = [
        {key: plan.calibration[key] for key in ("budget", "verified", "dtype")}
        | {
            "kept": round(plan.kv_budget(options.context), 4),
            "calibrated_for": plan.calibration.get("scaled_from", options.context),
        }
        | {"patterns": plan.counts(), "file": f"plans/{files[budget].name}"}
        for budget, plan in plans.items()
    ]
    return {"context": options.context, "plans": found}


def _quality(options: Options, folder: Path, model: str, task: str, checkpoint: Path) -> dict[str, Any]:
    plans = _plans(options, folder, model)
    loaded, tokenizer = _load(model, options.dtype, options.device)
    settings = {**options.of("items", "context", "seed"), "checkpoint": checkpoint, "progress": True}
    return quality.run(loaded, tokenizer, task, plans, **settings)


def _suite(options: Options, folder: Path, model: str, suite: str, task: str, checkpoint: Path) -> dict[str, Any]:
    check_tasks(SUITES[suite], [task])
    # These need the harness.
    from headsink.bench.longcontext.columns import engines
    from headsink.bench.longcontext.run import run as run_suite

    plans = _plans(options, folder, model)
    loaded, tokenizer = _load(model, options.dtype, options.device)
    length, most, chat = options.context, describe(loaded).max_context, tokenizer.chat_template is not None
    check_lengths([length], most)
    (found,) = run_suite(
        suite,
        tokenizer,
        partial(engines, loaded, tokenizer, plans),
        tasks=[task],
        lengths=[length],
        items=items_of(suite, options.items),
        seed=options.seed,
        chat=chat,
        most=most,
        checkpoints=checkpoint,
        settings=run_settings(loaded, plans, suite=suite, seed=options.seed),
    )
    remove(checkpoint, [f"{task}-{length}.jsonl"])
    return found | {"suite": suite, "metric": "score", "higher_is_better": True, "chat_format": chat}


def _families(options: Options, model: str, checkpoint: Path) -> dict[str, Any]:
    loaded, tokenizer = _load(model, options.dtype, options.device)
    settings = options.of("context", "budget", "families", "documents", "texts", "seed")
    found = domains.run(loaded, tokenizer, **settings, checkpoint=checkpoint, progress=True)
    domains.clear(checkpoint)
    return found | {"model": label(model)}


def _speed(options: Options, folder: Path, model: str, context: int, batch: int, _: Path) -> dict[str, Any]:
    settings = _cost(options, folder, model, context, batch)
    return speed.run(replace(settings, tokens=options.tokens, rounds=options.rounds)) | {"model": label(model)}


def _memory(options: Options, folder: Path, model: str, context: int, batch: int, _: Path) -> dict[str, Any]:
    return memory.run(_cost(options, folder, model, context, batch)) | {"model": label(model)}


def _cost(options: Options, folder: Path, model: str, context: int, batch: int) -> Comparison:
    """The options of speed and memory. The model that tasks ran on is released."""
    _load.cache_clear()
    plans = {
        name: plan.scale(context).model_copy(update={"quality": ()})
        for name, plan in _plans(options, folder, model).items()
    }
    settings = options.of("llama_cpp", "vllm", "seed", "device") | {"dtype": options.dtype or SPEED_DTYPE}
    return Comparison(model, [context], MEMORY_ROUNDS, batches=[batch], plans=plans, **settings)


def _time_left(wanted: list[Row], done: dict[str, dict[str, Any]], name: str) -> str:
    """Of a row and of all from it on: what is typical, times what rows of its kind took in this folder against that."""
    took: dict[str, tuple[float, float]] = {}
    for row in wanted:
        there = done.get(row.name, {})
        if (seconds := there.get("seconds")) and "resumed" not in there:
            for kind in ("", row.name.split("/")[0]):
                so_far = took.get(kind, (0.0, 0.0))
                took[kind] = (so_far[0] + seconds, so_far[1] + row.typical)

    def expected(row: Row) -> float:
        measured, typical = took.get(row.name.split("/")[0], took.get("", (1.0, 1.0)))
        return row.typical * measured / typical

    names = [row.name for row in wanted]
    row, *later = wanted[names.index(name) :]
    left = expected(row) + sum(expected(one) for one in later if records.state(one, done) != "measured")
    return f"about {_spoken(expected(row))}; all that is left about {_spoken(left)}"


def _spoken(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
