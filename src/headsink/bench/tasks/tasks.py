"""Benchmark tasks with prompts of a given length: how prompts are built, which strings stop an answer, how it is scored.

A plan calibrated for a long context keeps all of a short prompt, so every prompt is filled up: prompt and answer together have at
most `context` tokens, and nearly as many. The filler is of the task's own kind and is never part of a question:

- humaneval, mbpp: solved problems, then an unsolved one. Score: pass@1, by the data set's tests (sandbox.py).
- gsm8k, math500: worked problems, then an unsolved one. Score: whether the final answer is correct, by math-verify.
- mtbench: a chat in the model's format. Turns about Python's language reference come first, then the prompt's first turn, the
  full cache's answer to it, and the second turn, whose answer counts. There is no reference answer. Score: the share of the full
  cache's answer that is reproduced.
- perplexity: held-out text (data/corpus.py). Score: mean NLL of the next 256 tokens in nats; lower is better.

All tasks but mtbench are plain text to continue, so that base and chat models get the same prompts. A quarter of a data set's
problems is reserved for filler. Reading and retrieval are tasks of the long-context suites (bench/longcontext).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count, islice
from typing import TYPE_CHECKING, Any, TypeVar

from headsink.bench.tasks import datasets, scoring
from headsink.bench.tasks.datasets import Problem, Sum
from headsink.bench.tasks.sandbox import judge
from headsink.data import corpus
from headsink.errors import HeadsinkError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TARGET = 256  # tokens of text that perplexity scores
ANSWER_CHARACTERS = 1500  # maximum length of an answer in the filler turns of mtbench
TURN = 12  # maximum tokens that a chat format adds to a turn
SAME, NLL = "same tokens", "nll"  # metrics that need no reference
MISSES = 50  # stop filling after so many parts that do not fit

Message = dict[str, str]
Record = TypeVar("Record")


@dataclass(frozen=True)
class Item:
    """One prompt of a task.

    score: the task's metric of the generated text, up to the first stop string, where it is made of the text alone. follow: for a
    chat, makes the prompt of the second turn from the answer to `ids`. target: token ids after `ids`, scored by their NLL.
    """

    name: str
    ids: list[int]
    score: Callable[[str], float] | None = None
    follow: Callable[[str], list[int]] | None = None
    target: list[int] | None = None


@dataclass(frozen=True)
class Room:
    """The token limit of a prompt, and the random generator for its choices."""

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    seed: int
    rng: random.Random

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def size(self, text: str) -> int:
        """Return the tokens of a part of a prompt plus one, because joined parts may be tokenised differently."""
        return len(self.encode(text)) + 1

    def fill(self, parts: Iterable[str], left: int) -> Iterator[str]:
        """Yield the parts that fit into `left` tokens, in order; skip those that do not."""
        misses = 0
        for part in parts:
            if (size := self.size(part)) <= left:
                left -= size
                yield part
            elif (misses := misses + 1) == MISSES:
                return

    def shuffle(self, records: Sequence[Record]) -> list[Record]:
        return self.rng.sample(records, len(records))

    def split(self, records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        """Return a random quarter for filler, and the rest for questions, in random order."""
        shuffled = self.shuffle(records)
        return shuffled[: len(shuffled) // 4], shuffled[len(shuffled) // 4 :]


@dataclass(frozen=True)
class Task:
    """A benchmark task. metric: name of its score. stops: strings that end an answer. new_tokens: maximum tokens of an answer."""

    name: str
    metric: str
    new_tokens: int
    stops: tuple[str, ...]
    make: Callable[[Room], Iterator[Item]]
    higher_is_better: bool = True

    def items(self, tokenizer: PreTrainedTokenizerBase, number: int, context: int, seed: int) -> list[Item]:
        """Make `number` items; a larger number begins with the same items. Raises HeadsinkError if there are fewer."""
        room = Room(tokenizer, context - self.new_tokens, seed, random.Random(f"{self.name} {seed}"))
        made = list(islice(self.make(room), number))
        if not made:
            raise HeadsinkError(f"context: {context} tokens are too few for {self.name}; give more")
        if len(made) < number:
            raise HeadsinkError(f"items: {self.name} has {len(made)} at {context} tokens, fewer than {number}")
        return made


def task(name: str) -> Task:
    """Return a task by its name. Raises HeadsinkError for an unknown one."""
    if name not in TASKS:
        raise HeadsinkError(f"tasks: {name!r} is unknown; one of {', '.join(TASKS)}")
    return TASKS[name]


# code and maths


def _problems(
    records: Callable[[], Sequence[Any]],
    render: Callable[[Any, bool], str],
    score: Callable[[Any, str], float],
    room: Room,
) -> Iterator[Item]:
    """Make prompts of solved records followed by an unsolved one. render: record as text, with its solution or without."""
    filler, rest = room.split(records())
    for record in rest:
        prompt = render(record, False)
        left = room.tokens - room.size(prompt)
        if left >= 0:
            before = room.fill((render(other, True) for other in room.shuffle(filler)), left)
            yield Item(record.name, room.encode("".join([*before, prompt])), partial(score, record))


def _humaneval(problem: Problem, solved: bool) -> str:
    return problem.prompt.strip() + (f"\n{problem.solution.rstrip()}\n\n\n" if solved else "")


def _mbpp(problem: Problem, solved: bool) -> str:
    """The prompt of the data set's paper (Austin et al., arXiv 2108.07732)."""
    text, _, tests = problem.prompt.partition("\n")
    prompt = (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
        "[BEGIN]"
    )
    return prompt + (f"\n{problem.solution}\n[DONE]\n\n" if solved else "")


def _pass_at_1(continues_prompt: bool, problem: Problem, text: str) -> float:
    solution = problem.prompt.strip() + text if continues_prompt else text
    return float(judge(solution, problem.tests).passed)


def _maths(records: Callable[[], Sequence[Sum]], render: Callable[[Any, bool], str], room: Room) -> Iterator[Item]:
    """Make prompts of worked maths problems. Raises HeadsinkError without the package that scores their answers."""
    if find_spec("math_verify") is None:
        raise HeadsinkError(
            "tasks: math-verify, which scores answers in maths, is not installed: pip install 'headsink[eval]'"
        )
    yield from _problems(records, render, _exact, room)


def _exact(problem: Sum, text: str) -> float:
    return float(scoring.same_answer(text, problem.answer))


def _gsm8k(problem: Sum, solved: bool) -> str:
    return f"Question: {problem.prompt}\nAnswer:" + (f" {problem.solution}\n\n" if solved else "")


def _math500(problem: Sum, solved: bool) -> str:
    """The prompt of Minerva (Lewkowycz et al., arXiv 2206.14858)."""
    end = f" {problem.solution}\nFinal Answer: The final answer is ${problem.answer}$. I hope it is correct.\n\n"
    return f"Problem:\n{problem.prompt}\n\nSolution:" + (end if solved else "")


# chat


def _mtbench(room: Room) -> Iterator[Item]:
    def prompt(messages: list[Message]) -> list[int]:
        return room.encode(_chat(room.tokenizer, messages), room.tokenizer.chat_template is None)

    def follow(messages: list[Message], turn: str, answer: str) -> list[int]:
        return prompt([*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": turn}])

    new_tokens = task("mtbench").new_tokens  # of the answer to the first turn
    for name, (first, second) in room.shuffle(datasets.mtbench()):
        last: Message = {"role": "user", "content": first}
        left = room.tokens - len(prompt([last])) - new_tokens - room.size(second) - 2 * TURN
        before: list[Message] = []
        for topic, text in room.shuffle(list(corpus.prose("heldout").items())):
            turns = _filler_turns(topic, text)
            size = sum(room.size(turn["content"]) + TURN for turn in turns)
            if size <= left:
                left -= size
                before += turns
        if left >= 0:
            messages = [*before, last]
            yield Item(name, prompt(messages), follow=partial(follow, messages, second))


def _filler_turns(topic: str, text: str) -> list[Message]:
    question = f"What does the Python language reference say about {topic.replace('-', ' ')}?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text[:ANSWER_CHARACTERS].strip()}]


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """Format a chat by the tokenizer's template, or as plain text if it has none."""
    from headsink.generation.templates import chat_prompt  # imported here, because it imports torch

    if tokenizer.chat_template is not None:
        return chat_prompt(tokenizer, messages)
    return "".join(f"{message['role'].title()}: {message['content']}\n\n" for message in messages) + "Assistant:"


# text


def _perplexity(room: Room) -> Iterator[Item]:
    for number in count() if room.tokens > TARGET else ():
        domain = corpus.DOMAINS[number % len(corpus.DOMAINS)]
        ids = corpus.tokens(domain, room.tokenizer, room.tokens, seed=1000 * room.seed + number, split="heldout")
        yield Item(f"{domain} {number}", ids[:-TARGET], target=ids[-TARGET:])


_TASKS = (
    Task(
        "humaneval",
        "pass@1",
        192,
        ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\nfrom ", "\nimport ", "\n@", "\n```"),
        partial(_problems, datasets.humaneval, _humaneval, partial(_pass_at_1, True)),
    ),
    Task("mbpp", "pass@1", 192, ("[DONE]",), partial(_problems, datasets.mbpp, _mbpp, partial(_pass_at_1, False))),
    Task("gsm8k", "exact", 192, ("\nQuestion:", "\n\n"), partial(_maths, datasets.gsm8k, _gsm8k)),
    Task(
        "math500",
        "exact",
        256,
        ("\nProblem:", "I hope it is"),
        partial(_maths, datasets.math500, _math500),
    ),
    Task("mtbench", SAME, 128, ("\nUser:",), _mtbench),
    Task("perplexity", NLL, 64, (), _perplexity, higher_is_better=False),
)
TASKS = {task.name: task for task in _TASKS}
