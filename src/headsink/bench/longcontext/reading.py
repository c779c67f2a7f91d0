"""Prompts about documents: LongBench's question answering, and questions that follow each other about one document."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from headsink.bench.tasks import datasets
from headsink.bench.tasks.datasets import Passage, Reading
from headsink.bench.tasks.tasks import Room, choose_passages, join_passages
from headsink.errors import HeadsinkError

Record = dict[str, Any]
TURNS = 5  # questions about a document
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
        passages = choose_passages(room, reading.needed, [reading, *room.shuffle(filler)], room.tokens)
        if passages is not None:
            records.append(_record(join_passages(room, passages), reading.question, reading.answers))
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
        passages: list[Passage] = choose_passages(room, [], [*articles[title], *others], room.tokens) or []
        chosen = set(passages)
        asked = room.shuffle([reading for reading in articles[title] if reading.needed[0] in chosen])[:TURNS]
        document, before = join_passages(room, passages), ""
        for reading in asked:
            records.append(_record(document, before + reading.question, reading.answers))
            before += f"{reading.question}\nAnswer: {reading.answers[0]}\n\nQuestion: "
    if len(records) < items * TURNS:
        raise HeadsinkError(f"items: there are {len(titles)} documents, fewer than {items}")
    return records


def _record(document: str, question: str, answers: list[str]) -> Record:
    document = document.strip()
    return {"context": document, "document": document, "question": question, "answers": answers}
