"""A suite's tasks in the lm-evaluation-harness, and the model that it asks.

Prompts and scores are those of the harness's own tasks (lm_eval/tasks/ruler and longbench), which get documents from this machine
instead of a download. The model reads the document of a prompt, everything up to the end of the record's `document`, compresses
it, and only then reads the rest and answers greedily.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from headsink.bench.checkpoint import Checkpoint
from headsink.bench.longcontext.engines import Engine
from headsink.bench.longcontext.reading import longbench_records, multiturn_records
from headsink.bench.longcontext.ruler import needle_records, ruler_records
from headsink.bench.tasks.scoring import cut
from headsink.generation.templates import chat_prompt, encode

Record = dict[str, Any]
WARM_UP = 512  # tokens of a document
PREFIX = 32  # tokens of the answer's beginning that RULER gives, which its sizes leave out
LONGBENCH = {"squad": "multifieldqa_en", "hotpotqa": "hotpotqa", "qasper": "qasper", "multiturn": "multifieldqa_en"}
RULER_QA = ("qa_squad", "qa_hotpot")
SCORES = {"4096", "score"}  # names of the harness's scores, of RULER (by a length) and of LongBench


def make_records(
    suite: str,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    items: int,
    length: int,
    seed: int,
    *,
    chat: bool = False,
    most: int | None = None,
) -> list[Record]:
    """Make the records of a task: prompts of at most `length` tokens with the answer.

    As in the harness, the model's chat format (`chat`) comes on top, unless all would be over `most` tokens.
    """
    frame = len(encode(tokenizer, chat_prompt(tokenizer, [{"role": "user", "content": ""}]))) if chat else 0
    room = min(length, (most or 2 * length) - frame - PREFIX)
    if suite == "ruler":
        return ruler_records(task, tokenizer, items, room, seed)
    if suite == "needles":
        return needle_records(tokenizer, items, room, seed)
    if suite == "multiturn":
        return multiturn_records(tokenizer, items, room, seed)
    return longbench_records(task, tokenizer, items, room, seed)


def load_task(suite: str, task: str, records: list[Record]) -> Task:
    """Return the harness's task with these records."""
    if suite == "ruler":
        name = task if task.startswith("niah") else f"ruler_{task}"
    elif suite == "needles":
        name = "niah_single_2"
    else:
        name = f"longbench_{LONGBENCH[task]}"

    def data(**_: Any) -> dict[str, hf_datasets.Dataset]:
        return {"test": hf_datasets.Dataset.from_list(records)}

    settings = {"task": name, "custom_dataset": data} | ({"process_results": _any_answer} if task in RULER_QA else {})
    # the harness overrides settings of a task only where it is part of a group
    loaded = _tasks().load({"group": "suite", "task": [settings]})
    return loaded["tasks"][name]


def _any_answer(record: Record, results: list[str]) -> dict[str, float]:
    """Return 1 if an answer of a question is in the text, as RULER does. The harness takes the share of its answers."""
    return {"4096": float(any(answer.lower() in results[0].lower() for answer in record["outputs"]))}


@cache
def _tasks() -> TaskManager:
    for name in ("lm_eval", "headsink"):
        logging.getLogger(name).setLevel(logging.ERROR)  # the harness reports every step
    folder = Path(lm_eval.__file__).parent / "tasks"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
        return TaskManager(include_path=[folder / "ruler", folder / "longbench"], include_defaults=False)


def evaluate(task: Task, model: SuiteModel, chat: bool) -> list[float]:
    """Answer every record of a task and return the scores that the harness gives."""
    name = task.task_name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = lm_eval.evaluate(model, {"tasks": {name: task}}, bootstrap_iters=0, apply_chat_template=chat)
    samples = found["samples"][name]
    (score,) = SCORES.intersection(samples[0]["metrics"])
    return [float(sample[score]) for sample in samples]


class SuiteModel(LM):
    """An engine as the harness sees it. `records` are what was measured of each item, also by earlier runs.

    advance: called for every item.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        done: Checkpoint,
        chat: bool,
        advance: Callable[[], Any],
    ):
        super().__init__()
        self.engine, self.tokenizer, self.done, self.chat, self.advance = engine, tokenizer, done, chat, advance
        self.warm = False
        self.document: list[int] = []
        self.records: list[Record] = []

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request, after in zip_longest(requests, requests[1:]):
            item = f"{self.engine.name} {request.doc_id}"
            if item not in self.done.records:
                self.done.add({"item": item} | self._measure(request, after))
            self.records.append(self.done.records[item])
            self.advance()
        return [record["output"] for record in self.records]

    def _measure(self, request: Instance, after: Instance | None) -> Record:
        prompt, options = request.args
        end = prompt.index(request.doc["document"]) + len(request.doc["document"])
        document = encode(self.tokenizer, prompt[:end], special=not self.chat)
        question = encode(self.tokenizer, prompt[end:])
        if not self.warm:  # kernels are compiled here
            self.engine.read(document[:WARM_UP])
            self.engine.answer(question, 3, options["until"], False)
            self.warm = True
        record: Record = {"document_tokens": len(document), "prompt_tokens": len(document) + len(question)}
        if document != self.document:
            read = self.engine.read(document)
            record |= {"read_s": read.read_s, "kv_bytes": read.kv_bytes, "full_bytes": read.full_bytes}
        keep = after is not None and after.doc["document"] == request.doc["document"]
        answer = self.engine.answer(question, options["max_gen_toks"], options["until"], keep)
        self.document = document if keep else []
        text = cut(str(self.tokenizer.decode(answer.ids, skip_special_tokens=True)), options["until"])
        record |= {"output": text, "new_tokens": len(answer.ids), "first_s": answer.first_s}
        record["step_s"] = statistics.fmean(answer.steps_s) if answer.steps_s else None
        return record | {"peak_bytes": self.engine.peak_bytes()}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("the tasks of the suites only generate")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("the tasks of the suites only generate")
