"""The long-context suites and their tasks, and the checks that need neither a model nor the harness. Does not import torch.

- ruler: the thirteen tasks of RULER (arXiv 2404.06654). Prose of Python's language reference is the haystack, instead of essays.
- longbench: three kinds of tasks of LongBench (arXiv 2308.14508), with its prompts and scores: questions about one document
  (SQuAD's passages), two passages that are needed together (HotpotQA), and a paper (QASPER, yes or no).
- needles: one needle at eleven depths of a text, at several lengths.
- multiturn: questions that follow each other about one document, as in SCBench (arXiv 2412.10319). Each turn is asked after the
  earlier questions and their reference answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from headsink.bench.tasks import datasets
from headsink.errors import HeadsinkError

# modules of the harness, and of what it needs for these tasks
HARNESS = ("lm_eval", "nltk", "wonderwords", "scipy", "jieba", "fuzzywuzzy", "rouge")
INSTALL = "pip install 'headsink[eval]'"
DEPTHS = tuple(range(0, 101, 10))  # of needles, in percent of a text
TURNS = 5  # questions about a document of multiturn
LEAST_LENGTH = 500  # tokens; the prompts and the answer alone take up to 300


@dataclass(frozen=True)
class Suite:
    """tasks: names of its tasks, each with the data file it reads, if any. lengths: default lengths in tokens."""

    name: str
    tasks: dict[str, str | None]
    lengths: tuple[int, ...]


_SQUAD, _HOTPOTQA = (datasets.SYNTHETIC.format(name) for name in ("squad", "hotpotqa"))
_NIAH = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multiquery", "multivalue")
_RULER = dict.fromkeys((*(f"niah_{kind}" for kind in _NIAH), "vt", "cwe", "fwe"), None)
_SUITES = (
    Suite("ruler", _RULER | {"qa_squad": _SQUAD, "qa_hotpot": _HOTPOTQA}, (4096, 8192)),
    Suite(
        "longbench",
        {"squad": _SQUAD, "hotpotqa": _HOTPOTQA, "qasper": datasets.OLMO.format("qasper_yesno/rc_5shot")},
        (4096, 8192),
    ),
    Suite("needles", {"needles": None}, (1024, 2048, 4096, 8192)),
    Suite("multiturn", {"multiturn": _SQUAD}, (4096,)),
)
SUITES = {suite.name: suite for suite in _SUITES}


def find_suite(name: str) -> Suite:
    """Return a suite by its name. Raises HeadsinkError for an unknown one."""
    if name not in SUITES:
        raise HeadsinkError(f"suite: {name!r} is unknown; one of {', '.join(SUITES)}")
    return SUITES[name]


def check_tasks(suite: Suite, tasks: Sequence[str]) -> None:
    """Raise HeadsinkError for a task that is not in the suite, and for packages that are not installed."""
    for task in tasks:
        if task not in suite.tasks:
            raise HeadsinkError(f"tasks: {task!r} is not in {suite.name}; one of {', '.join(suite.tasks)}")
    if missing := [module for module in HARNESS if find_spec(module) is None]:
        raise HeadsinkError(f"suite: it needs {missing[0]}, which is not installed: {INSTALL}")
    for file in filter(None, (suite.tasks[task] for task in tasks)):
        datasets.find(file)


def items_of(suite: str, prompts: int) -> int:
    """Return the items of a task that make about so many prompts: needles have one at each depth, multiturn's documents five."""
    return -(-prompts // {"needles": len(DEPTHS), "multiturn": TURNS}.get(suite, 1))


def check_lengths(lengths: Sequence[int], most: int | None = None) -> None:
    """Raise HeadsinkError for lengths that are too short, or over the model's maximum `most`, in tokens."""
    for length in lengths:
        if length < LEAST_LENGTH:
            raise HeadsinkError(f"lengths: {length} tokens are too few; give {LEAST_LENGTH} or more")
        if most is not None and length > most:
            raise HeadsinkError(f"lengths: {length} is over the model's maximum of {most}")
