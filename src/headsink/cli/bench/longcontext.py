"""`headsink bench quality --suite`: run a long-context suite and write its results (bench/longcontext)."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import headsink
from headsink.bench.heading import version_of
from headsink.bench.tasks.suites import Suite, check_lengths
from headsink.cli.options import names
from headsink.errors import HeadsinkError
from headsink.utils.files import remove, write_text
from headsink.utils.terminal import resumable, write

if TYPE_CHECKING:
    from headsink.cli.bench.quality import QualityOptions


def measure_suite(
    options: QualityOptions, suite: Suite, tasks: list[str], lengths: list[int], budgets: list[float]
) -> None:
    """Run a suite; of needles, draw a heat map next to --out.

    An interrupted run continues when it is started again with the same options.
    """
    from headsink.bench.checkpoint import run_settings
    from headsink.bench.longcontext.columns import engines
    from headsink.bench.longcontext.engines import start_kvpress
    from headsink.bench.longcontext.heat_map import heat_map
    from headsink.bench.longcontext.run import run, table
    from headsink.models.spec import describe
    from headsink.report.assets import write_picture

    given = {file.stem: headsink.Plan.load(file) for file in options.plan_files or ()}
    model, tokenizer = headsink.load(options.model, dtype=options.dtype, device=options.device)
    most, seed = describe(model).max_context, options.seed
    if options.lengths is None:  # the suite's own, as far as the model goes
        lengths = [length for length in lengths if length <= most] or [most]
    check_lengths(lengths, most)
    if not options.raw and tokenizer.chat_template is None:
        raise HeadsinkError(f"model: {options.model} has no chat template; give --raw to ask it without a chat format")
    file, longest = options.out_file, max(lengths)
    checkpoint = file.with_name(f".{file.name}.partial")
    with resumable(checkpoint, options.plan_folder), ExitStack() as stack:
        process = None
        if options.kvpress is not None:
            process = stack.enter_context(start_kvpress(options.kvpress, options.model, model))
        plans = options.made_plans(model, tokenizer, budgets, longest) | {
            name: plan.for_model(model) if options.other_weights else plan for name, plan in given.items()
        }
        for plan in plans.values():
            plan.check(model)
        about = {"suite": suite.name, "seed": seed, "chat_format": not options.raw, "kv_dtype": options.kv_dtype}
        about["peers"] = {"lm-eval": version_of("lm-eval"), "kvpress": process and process.ready["version"]}
        columns: dict[str, Any] = {"kv_dtype": options.kv_dtype, "kvpress": process, "presses": names(options.presses)}
        results = run(
            suite.name,
            tokenizer,
            partial(engines, model, tokenizer, plans, **columns),
            tasks=tasks,
            lengths=lengths,
            items=options.items,
            seed=seed,
            chat=not options.raw,
            most=most,
            checkpoints=checkpoint,
            settings=run_settings(model, plans, **about),
        )
    result = options.describe(model, plans, longest) | about | {"results": results}
    text = json.dumps(result, indent=1) + "\n"
    write_text(file, text, options.force)
    if suite.name == "needles":
        write_picture(file.with_suffix(""), heat_map(results, options.model))
    remove(checkpoint, [f"{task}-{length}.jsonl" for task in tasks for length in lengths])
    write(text if options.as_json else f"{table(results)}\n\nResults: {file}\n")
