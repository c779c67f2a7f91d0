"""Prompts of RULER's thirteen tasks, and needles at chosen depths, by the harness's own generators from texts on this machine.

The harness would download essays for the haystack, SQuAD, HotpotQA and a sentence splitter. Here the haystack is the held-out
half of the built-in prose, the data sets come from an installed package (tasks/datasets.py), and sentences are split by an
untrained Punkt. All else, templates and sizes, is the harness's.
"""

from __future__ import annotations

import random
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from sys import stderr
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import nltk
import numpy as np
from nltk.tokenize.punkt import PunktParameters, save_punkt_params
from transformers import PreTrainedTokenizerBase

from headsink.bench.tasks import datasets
from headsink.bench.tasks.suites import DEPTHS
from headsink.data import corpus
from headsink.errors import HeadsinkError

Record = dict[str, Any]
HARNESS_LEAST = 4096  # tokens, the harness's shortest length


class _Niah(NamedTuple):
    """Arguments of the harness's needle generator, as in its tasks (lm_eval/tasks/ruler/niah_utils.py)."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    number: dict[str, int] = {}  # noqa: RUF012, a NamedTuple's default


_NIAH = {
    "niah_single_1": _Niah("repeat"),
    "niah_single_2": _Niah("essay"),
    "niah_single_3": _Niah("essay", values="uuids"),
    "niah_multikey_1": _Niah("essay", number={"num_needle_k": 4}),
    "niah_multikey_2": _Niah("needle"),
    "niah_multikey_3": _Niah("needle", keys="uuids", values="uuids"),
    "niah_multiquery": _Niah("essay", number={"num_needle_q": 4}),
    "niah_multivalue": _Niah("essay", number={"num_needle_v": 4}),
}


def ruler_records(task: str, tokenizer: PreTrainedTokenizerBase, items: int, length: int, seed: int) -> list[Record]:
    """Make `items` prompts of a task, of at most `length` tokens with the answer; a larger number begins with the same ones.

    Each has the fields of the harness's task, and `document`: the prompt without its last line, which is the question.
    """
    made = _generate(task, tokenizer, items, length, seed)
    if len(made) < items:
        raise HeadsinkError(f"lengths: {length} tokens are too few for {task}; give more")
    return [record | {"document": record["input"].rpartition("\n")[0]} for record in made]


def needle_records(tokenizer: PreTrainedTokenizerBase, items: int, length: int, seed: int) -> list[Record]:
    """Make `items` prompts for each of `DEPTHS` percent, with one needle there; `depth` says where."""
    _no_downloads()
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import NEEDLE, generate_random_number, generate_random_word

    random.seed(f"needles {length} {seed}")
    sentences = corpus.SENTENCE.split(" ".join(_haystack()))
    template = TEMPLATE.replace("Some", "A").replace("are all", "is").replace("are", "is")
    records = []
    for number in range(items * len(DEPTHS)):
        depth, key, value = DEPTHS[number % len(DEPTHS)], generate_random_word(), generate_random_number()
        needle = NEEDLE.format(type_needle_v="numbers", key=key, value=value)
        start = random.randrange(len(sentences) // 2)
        question = template.format(type_needle_v="number", context="", query=key)
        prefix = f"The special magic number for {key} mentioned in the provided text is"
        left = length - 128 - sum(len(tokenizer(text).input_ids) for text in (needle, question, prefix))
        text, ends = list[str](), [0]  # tokens up to the end of each sentence
        for sentence in sentences[start:]:
            end = ends[-1] + len(tokenizer(f" {sentence}").input_ids)
            if end > left:
                break
            text.append(sentence)
            ends.append(end)
        text.insert(min(range(len(ends)), key=lambda n: abs(ends[n] - ends[-1] * depth / 100)), needle)
        prompt = template.format(type_needle_v="number", context=" ".join(text), query=key)
        records.append(
            {"input": prompt, "outputs": [value], "gen_prefix": prefix, "depth": depth}
            | {"max_length": HARNESS_LEAST, "document": prompt.rpartition("\n")[0]}
        )
    return records


def _generate(task: str, tokenizer: PreTrainedTokenizerBase, items: int, length: int, seed: int) -> list[Record]:
    _no_downloads()
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, prepare_niah, qa_utils, vt_utils
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    random.seed(f"{task} {length} {seed}")
    np.random.seed(seed % 2**32)  # noqa: NPY002, the generators use numpy's global one too
    cwe_utils.RNG.seed(f"{length} {seed}")
    common = {"num_samples": items, "max_seq_length": length}
    with redirect_stdout(stderr):  # the generators print their progress
        if task in _NIAH:
            haystack, keys, values, number = _NIAH[task]
            text = _haystack() if haystack == "essay" else prepare_niah.get_haystack(haystack)
            kinds = {"type_haystack": haystack, "type_needle_k": keys, "type_needle_v": values}
            made = prepare_niah.generate_samples(text, tokenizer, template=TEMPLATE, **kinds, **number, **common)
        elif task == "vt":
            example = vt_utils.sys_vartrack_w_noise_random(tokenizer, num_samples=1, max_seq_length=500, incremental=5)
            made = vt_utils.sys_vartrack_w_noise_random(tokenizer, icl_example=example[0], **common)
        elif task == "cwe":
            made = cwe_utils.sys_word_pair_random(tokenizer=tokenizer, **common)
        elif task == "fwe":
            # its length is of the prompt alone
            made = fwe_utils.sys_kwext(tokenizer, **(common | {"max_seq_length": length - 50}))
        else:
            questions, documents = _questions(task)
            random.shuffle(questions)
            step = 10 if length >= HARNESS_LEAST else 1  # the harness's own, and for lengths that it does not have
            common["num_samples"] = 2 * items  # questions whose passages do not fit are left out
            made = qa_utils.generate_samples(tokenizer, documents, questions, incremental=step, **common)[:items]
    return [record | {"max_length": HARNESS_LEAST} for record in made]  # the harness names a score by it


def _questions(task: str) -> tuple[list[Record], list[str]]:
    """Return questions with the indices of their documents, and all documents, as the harness's readers do."""
    readings = datasets.squad() if task == "qa_squad" else datasets.hotpotqa()
    titled = task == "qa_hotpot"

    def text(passage: datasets.Passage) -> str:
        return f"{passage.title}\n{passage.text}" if titled else passage.text

    documents = sorted({text(passage) for reading in readings for passage in (*reading.needed, *reading.near)})
    index = {document: number for number, document in enumerate(documents)}
    of_title: dict[str, list[int]] = {}
    for reading in readings:
        for passage in reading.needed:
            of_title.setdefault(passage.title, []).append(index[text(passage)])
    found = []
    for reading in readings:
        own = [index[text(passage)] for passage in (*reading.needed, *reading.near)]
        more = [] if titled else list(dict.fromkeys(of_title[reading.needed[0].title]))
        question = {"query": reading.question, "outputs": reading.answers, "context": own}
        found.append(question | {"more_context": [number for number in more if number not in own]})
    return found, documents


@cache
def _haystack() -> list[str]:
    """Return the words of the held-out prose."""
    return " ".join(corpus.prose("heldout").values()).split()


@cache
def _no_downloads() -> TemporaryDirectory[str]:
    """Put an untrained sentence splitter where nltk looks first; the harness downloads one if it finds none."""
    folder = TemporaryDirectory(prefix="headsink-punkt-")
    nltk.data.path.insert(0, folder.name)
    place = Path(folder.name, "tokenizers", "punkt_tab", "english")
    place.mkdir(parents=True)
    save_punkt_params(PunktParameters(), str(place))
    return folder
