"""The tasks that a model is judged by under a plan: prompts as long as is asked for, where they end, and how answers score.

A plan for contexts of some length keeps all of a short prompt, so every prompt is filled up: prompt and answer together have at
most `context` tokens, and mostly little less. What fills it is of the task's own kind, and nothing that fills is ever asked:

- humaneval, mbpp: other problems with their solutions; then the one asked. The score is whether the code passes the data
  set's tests (sandbox.py), at the first try.
- gsm8k, math500: other problems worked out; the score is whether the answer is the same.
- squad, hotpotqa, qasper: passages of other documents beside those of the question, in random order; two questions about others
  of them with their answers, then the one asked. qasper has questions about a paper that are answered by yes or no (two thirds
  by yes); of a paper that is too long the evidence stays. The score is F1 of the words, as the data sets have it.
- mtbench: a chat in the model's own format, with turns about Python's language reference in front; then the first turn of the
  prompt, the answer that the model itself gives to it, and the second turn, which is what is answered and compared. There is no
  reference, so the score is agreement with the model itself: the share of its answer that comes out the same.
- retrieval: facts strewn over text, a question about one of them (the held-out forms of probes.py); the score is whether the
  answer begins right.
- perplexity: held-out text (corpus.py); the score is the mean nll of the 256 tokens that follow, in nats, lower being better.

All but mtbench are plain text to be continued, so that base and chat models are asked the same. A quarter of the problems or
questions of a data set is kept to fill prompts with.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any, TypeVar

from headsink.bench.tasks import datasets, scoring
from headsink.bench.tasks.datasets import Passage, Problem, Reading, Sum
from headsink.bench.tasks.sandbox import judge
from headsink.data import corpus, documents
from headsink.errors import HeadsinkError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TARGET = 256  # tokens of text that perplexity scores
QUESTION = 80  # tokens that a question of retrieval may have
EXAMPLES = 2  # questions with answers before the one asked, where passages fill the prompt
TOLD = 1500  # characters of an answer in the chat that fills a prompt
TURN = 12  # tokens that a chat format puts around a turn, at most
SAME, NLL = "same tokens", "nll"  # metrics that need no reference
MISSES = 50  # parts that were too long for the room left, after which no more are tried

Scores = dict[str, float]
Message = dict[str, str]
Record = TypeVar("Record")


@dataclass(frozen=True)
class Item:
    """One prompt. `score` judges what was generated, up to the first stop; the task's metric is one of what it gives.

    follow: of a chat, the prompt of the turn that counts, from the answer to `ids`. target: tokens that come after `ids`, which
    are scored by their nll.
    """

    name: str
    ids: list[int]
    score: Callable[[str], Scores] = field(default=lambda text: {})
    follow: Callable[[str], list[int]] | None = None
    target: list[int] | None = None


@dataclass(frozen=True)
class Room:
    """How many tokens a prompt may have, and by what random choices are made."""

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    seed: int
    rng: random.Random

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def size(self, text: str) -> int:
        """Tokens of a part of a prompt, and one more: parts may be cut into tokens otherwise once they are joined."""
        return len(self.encode(text)) + 1

    def fitting(self, parts: Iterable[str], left: int) -> Iterator[str]:
        """Those of the parts that fit beside the ones before."""
        misses = 0
        for part in parts:
            if (size := self.size(part)) <= left:
                left -= size
                yield part
            elif (misses := misses + 1) == MISSES:
                return

    def mixed(self, records: Sequence[Record]) -> list[Record]:
        return self.rng.sample(records, len(records))

    def split(self, records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        """A quarter that fills prompts, and what is asked, in random order."""
        mixed = self.mixed(records)
        return mixed[: len(mixed) // 4], mixed[len(mixed) // 4 :]


@dataclass(frozen=True)
class Task:
    """metric: the name of its score. stops: what ends an answer. new_tokens: of an answer at most."""

    name: str
    metric: str
    new_tokens: int
    stops: tuple[str, ...]
    make: Callable[[Room], Iterator[Item]]
    higher_is_better: bool = True

    def items(self, tokenizer: PreTrainedTokenizerBase, number: int, context: int, seed: int) -> list[Item]:
        """So many items; of more, the first are the same. Raises HeadsinkError if not so many fit."""
        room = Room(tokenizer, context - self.new_tokens, seed, random.Random(f"{self.name} {seed}"))
        made = list(islice(self.make(room), number))
        if not made:
            raise HeadsinkError(f"context: {context} tokens are too few for {self.name}; give more")
        if len(made) < number:
            raise HeadsinkError(f"items: {self.name} has {len(made)} at {context} tokens, {number} were asked for")
        return made


def task(name: str) -> Task:
    """A task by its name."""
    if name not in TASKS:
        raise HeadsinkError(f"tasks: {name!r} is unknown; one of {', '.join(TASKS)}")
    return TASKS[name]


# code and maths


def _worked(
    records: Callable[[], Sequence[Any]],
    shown: Callable[[Any, bool], str],
    score: Callable[[Any, str], Scores],
    room: Room,
) -> Iterator[Item]:
    """Other records with their solutions, then the one asked. shown: a record as text, with its solution or without."""
    kept, rest = room.split(records())
    for record in rest:
        asked = shown(record, False)
        left = room.tokens - room.size(asked)
        if left >= 0:
            before = room.fitting((shown(other, True) for other in room.mixed(kept)), left)
            yield Item(record.name, room.encode("".join([*before, asked])), partial(score, record))


def _humaneval(problem: Problem, solved: bool) -> str:
    return problem.asked.strip() + (f"\n{problem.solution.rstrip()}\n\n\n" if solved else "")


def _mbpp(problem: Problem, solved: bool) -> str:
    """As in the paper of the data set (Austin et al.)."""
    text, _, tests = problem.asked.partition("\n")
    asked = (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
        "[BEGIN]"
    )
    return asked + (f"\n{problem.solution}\n[DONE]\n\n" if solved else "")


def _passes(goes_on: bool, problem: Problem, text: str) -> Scores:
    solution = problem.asked.strip() + text if goes_on else text
    return {"pass@1": float(judge(solution, problem.tests).passed)}


def _gsm8k(problem: Sum, solved: bool) -> str:
    return f"Question: {problem.asked}\nAnswer:" + (f" {problem.solution}\n\n" if solved else "")


def _math500(problem: Sum, solved: bool) -> str:
    """As in the paper of Minerva (Lewkowycz et al.)."""
    end = f" {problem.solution}\nFinal Answer: The final answer is ${problem.answer}$. I hope it is correct.\n\n"
    return f"Problem:\n{problem.asked}\n\nSolution:" + (end if solved else "")


def _same_number(problem: Sum, text: str) -> Scores:
    return {"exact": float(scoring.same_number(text, problem.answer))}


def _same_maths(problem: Sum, text: str) -> Scores:
    return {"exact": float(scoring.same_maths(text, problem.answer))}


# reading


def _reading(how: str, closed: bool, records: Callable[[], Sequence[Reading]], room: Room) -> Iterator[Item]:
    """how: in what way to answer. closed: as for scoring.f1."""
    kept, rest = room.split(records())
    start = f"Read the passages, then answer the questions about them {how}.\n\n"
    for reading in rest:
        for examples in range(EXAMPLES, -1, -1):  # fewer where there is no room
            others = room.rng.sample(kept, examples)
            end = "".join(f"Question: {other.asked}\nAnswer: {other.answers[0]}\n\n" for other in others)
            end += f"Question: {reading.asked}\nAnswer:"
            needed = [passage for one in (reading, *others) for passage in one.needed]
            left = room.tokens - room.size(start) - room.size(end)
            if (chosen := _chosen(room, needed, [reading, *room.mixed(kept)], left)) is not None:
                text = start + _documents(room, chosen) + end
                yield Item(reading.name, room.encode(text), partial(_words, reading.answers, closed))
                break


def _chosen(room: Room, needed: list[Passage], readings: Sequence[Reading], left: int) -> list[Passage] | None:
    """What is needed, and what else of some readings there is room for; None if there is too little for what is needed."""
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


def _documents(room: Room, passages: Sequence[Passage]) -> str:
    """Passages under the titles of their documents, in their order; the documents in random order."""
    by_title: dict[str, list[Passage]] = {}
    for passage in passages:
        by_title.setdefault(passage.title, []).append(passage)
    return "".join(
        "\n".join([title, *(passage.text for passage in sorted(by_title[title], key=lambda p: p.place))]) + "\n\n"
        for title in room.mixed(list(by_title))
    )


def _words(answers: Sequence[str], closed: bool, text: str) -> Scores:
    return {
        "f1": scoring.f1(text, answers, closed),
        "exact": scoring.exact(text, answers),
        "contains": scoring.contains(text, answers),
    }


# chat


def _mtbench(room: Room) -> Iterator[Item]:
    def prompt(messages: list[Message]) -> list[int]:
        return room.encode(_chat(room.tokenizer, messages), room.tokenizer.chat_template is None)

    def follow(messages: list[Message], turn: str, answer: str) -> list[int]:
        return prompt([*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": turn}])

    new_tokens = task("mtbench").new_tokens  # of the answer to the first turn
    for name, (first, second) in room.mixed(datasets.mtbench()):
        last: Message = {"role": "user", "content": first}
        left = room.tokens - len(prompt([last])) - new_tokens - room.size(second) - 2 * TURN
        before: list[Message] = []
        for topic, text in room.mixed(list(corpus.prose("heldout").items())):
            turns = _told(topic, text)
            size = sum(room.size(turn["content"]) + TURN for turn in turns)
            if size <= left:
                left -= size
                before += turns
        if left >= 0:
            messages = [*before, last]
            yield Item(name, prompt(messages), follow=partial(follow, messages, second))


def _told(topic: str, text: str) -> list[Message]:
    question = f"What does the Python language reference say about {topic.replace('-', ' ')}?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text[:TOLD].strip()}]


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """In the model's own format; plain, if it has none."""
    from headsink.generation.templates import chat_prompt  # which imports torch

    if tokenizer.chat_template is not None:
        return chat_prompt(tokenizer, messages)
    return "".join(f"{message['role'].title()}: {message['content']}\n\n" for message in messages) + "Assistant:"


# text


def _retrieval(room: Room) -> Iterator[Item]:
    length = room.tokens - QUESTION
    for number in count() if length >= documents.LEAST_LENGTH else ():
        domains = (corpus.DOMAINS[number % len(corpus.DOMAINS)],)
        seed = 1000 * room.seed + number
        document = documents.document(
            room.tokenizer, length, split="heldout", seed=seed, domains=domains, continuation=1
        )
        question = room.rng.choice(document.questions)
        asked, answer = question.ids[: -question.answer_tokens], question.ids[-question.answer_tokens :]
        right = re.compile(re.escape(str(room.tokenizer.decode(answer)).strip()) + r"(?!\w)")
        yield Item(f"{domains[0]} {number}, {question.form}", document.ids + asked, partial(_begins, right))


def _begins(right: re.Pattern[str], text: str) -> Scores:
    return {"exact": float(right.match(text.strip()) is not None)}


def _perplexity(room: Room) -> Iterator[Item]:
    for number in count() if room.tokens > TARGET else ():
        domain = corpus.DOMAINS[number % len(corpus.DOMAINS)]
        ids = corpus.tokens(domain, room.tokenizer, room.tokens, seed=1000 * room.seed + number, split="heldout")
        yield Item(f"{domain} {number}", ids[:-TARGET], target=ids[-TARGET:])


SHORTLY, YES_OR_NO = "with a few words from them", "with yes or no"
_TASKS = (
    Task(
        "humaneval",
        "pass@1",
        192,
        ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\nfrom ", "\nimport ", "\n@", "\n```"),
        partial(_worked, datasets.humaneval, _humaneval, partial(_passes, True)),
    ),
    Task("mbpp", "pass@1", 192, ("[DONE]",), partial(_worked, datasets.mbpp, _mbpp, partial(_passes, False))),
    Task("gsm8k", "exact", 192, ("\nQuestion:", "\n\n"), partial(_worked, datasets.gsm8k, _gsm8k, _same_number)),
    Task(
        "math500",
        "exact",
        256,
        ("\nProblem:", "I hope it is"),
        partial(_worked, datasets.math500, _math500, _same_maths),
    ),
    Task("squad", "f1", 32, ("\n",), partial(_reading, SHORTLY, False, datasets.squad)),
    Task("hotpotqa", "f1", 32, ("\n",), partial(_reading, SHORTLY, True, datasets.hotpotqa)),
    Task("qasper", "f1", 8, ("\n",), partial(_reading, YES_OR_NO, False, datasets.qasper)),
    Task("mtbench", SAME, 128, ("\nUser:",), _mtbench),
    Task("retrieval", "exact", 32, ("\n",), _retrieval),
    Task("perplexity", NLL, 64, (), _perplexity, higher_is_better=False),
)
TASKS = {task.name: task for task in _TASKS}
