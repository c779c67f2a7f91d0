"""Prompts about documents: LongBench's question answering, and questions that follow each other about one document."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from headsink.bench.tasks import datasets
from headsink.bench.tasks.datasets import Passage, Reading
from headsink.bench.tasks.suites import TURNS
from headsink.bench.tasks.tasks import MISSES, Room
from headsink.errors import HeadsinkError

Record = dict[str, Any]
FRAME = 300  # tokens of LongBench's instructions, the question and the answer at most
READINGS: dict[str, Callable[[], list[Reading]]] = {
    "squad": datasets.squad,
    "hotpotqa": datasets.hotpotqa,
    "qasper": datasets.qasper,
}


def longbench_records(
    task: str, tokenizer: PreTrainedTokenizerBase, items: int, length: int, seed: int
) -> list[Record]:
    """Make `items` questions among passages that fill `length` tokens, with the fields of LongBench."""
    room = Room(tokenizer, length - FRAME, seed, random.Random(f"longbench {task} {length} {seed}"))
    filler, rest = room.split(READINGS[task]())
    records: list[Record] = []
    for reading in rest:
        passages = _choose(room, reading.needed, [reading, *room.shuffle(filler)], room.tokens)
        if passages is not None:
            records.append(_record(_join(room, passages), reading.question, reading.answers))
        if len(records) == items:
            return records
    raise HeadsinkError(f"items: {task} has {len(records)} at {length} tokens, fewer than {items}")


def multiturn_records(tokenizer: PreTrainedTokenizerBase, items: int, length: int, seed: int) -> list[Record]:
    """Make `TURNS` questions for each of `items` documents; every turn repeats the earlier ones with reference answers."""
    room = Room(tokenizer, length - FRAME - TURNS * 60, seed, random.Random(f"multiturn {length} {seed}"))
    articles: dict[str, list[Reading]] = {}
    for reading in datasets.squad():
        articles.setdefault(reading.needed[0].title, []).append(reading)
    titles = room.shuffle(list(articles))
    records: list[Record] = []
    for number, title in enumerate(titles[:items]):
        others = [reading for other in titles[number + 1 :] + titles[:number] for reading in articles[other]]
        passages: list[Passage] = _choose(room, [], [*articles[title], *others], room.tokens) or []
        chosen = set(passages)
        asked = room.shuffle([reading for reading in articles[title] if reading.needed[0] in chosen])[:TURNS]
        document, before = _join(room, passages), ""
        for reading in asked:
            records.append(_record(document, before + reading.question, reading.answers))
            before += f"{reading.question}\nAnswer: {reading.answers[0]}\n\nQuestion: "
    if len(records) < items * TURNS:
        raise HeadsinkError(f"items: there are {len(titles)} documents, fewer than {items}")
    return records


def _record(document: str, question: str, answers: list[str]) -> Record:
    document = document.strip()
    return {"context": document, "document": document, "question": question, "answers": answers}


def _choose(room: Room, needed: list[Passage], readings: Sequence[Reading], left: int) -> list[Passage] | None:
    """Return the needed passages and others of the readings that fit into `left` tokens; None if the needed ones do not."""
    chosen: dict[Passage, None] = {}
    titles: set[str] = set()
    misses = 0
    rest = (passage for reading in readings for passage in (*reading.needed, *reading.near))
    for number, passage in enumerate(chain(needed, rest)):
        if passage in chosen:
            continue
        size = room.size(f"{passage.text}\n") + (0 if passage.title in titles else room.size(f"{passage.title}\n\n"))
        if size <= left:
            left -= size
            chosen[passage] = None
            titles.add(passage.title)
        elif number < len(needed):
            return None
        elif (misses := misses + 1) == MISSES:
            break
    return list(chosen)


def _join(room: Room, passages: Sequence[Passage]) -> str:
    """Format passages under the titles of their documents: documents in random order, passages in document order."""
    by_title: dict[str, list[Passage]] = {}
    for passage in passages:
        by_title.setdefault(passage.title, []).append(passage)
    return "".join(
        "\n".join([title, *(passage.text for passage in sorted(by_title[title], key=lambda p: p.number))]) + "\n\n"
        for title in room.shuffle(list(by_title))
    )
