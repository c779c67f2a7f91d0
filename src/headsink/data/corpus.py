"""Text to measure on, without any download: prose, code, maths, chat, question answering and random tokens.

Prose is Python's own language reference (`pydoc_data`), code the standard library, both read from the running
Python; chat is made of questions about the reference and its answers; maths is generated, with the steps worked out; question
answering asks for sentences of a passage of the reference; random tokens are drawn evenly from the vocabulary.
Every item belongs to the `calibration` or to the `heldout` half by the hash of its name, and paragraphs that stand
in both halves are taken out of the second, so no sentence that a plan is judged on was seen when it was made.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Literal

from headsink.errors import HeadsinkError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Domain = Literal["prose", "code", "maths", "chat", "qa", "random"]
Split = Literal["calibration", "heldout"]
DOMAINS: tuple[Domain, ...] = ("prose", "code", "maths", "chat")  # what plans are made with and judged on
CENSUS_DOMAINS: tuple[Domain, ...] = (*DOMAINS, "qa", "random")
CHARACTERS_PER_TOKEN = 6  # more than any tokenizer needs on this text; what is too much is cut


def tokens(domain: str, tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0, split: Split) -> list[int]:
    """A text of exactly `length` tokens, special tokens at its start included.

    The same arguments give the same text on the same Python. Raises HeadsinkError if there is not so much text.
    """
    if domain not in CENSUS_DOMAINS:
        raise HeadsinkError(f"domain: {domain!r} is unknown; one of {', '.join(CENSUS_DOMAINS)}")
    rng = random.Random(f"{domain} {seed}")
    if domain == "random":
        opening: list[int] = tokenizer("", verbose=False)["input_ids"]
        special = set(tokenizer.all_special_ids)
        ordinary = [token for token in range(len(tokenizer)) if token not in special]
        return [*opening, *rng.choices(ordinary, k=length)][:length]
    ids: list[int] = tokenizer(text(domain, tokenizer, length, seed=seed, split=split), verbose=False)["input_ids"]
    if len(ids) < length:
        raise HeadsinkError(
            f"length: the built-in {domain} has {len(ids)} tokens, {length} were asked for; give texts of your own"
        )
    return ids[:length]


def text(domain: str, tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0, split: Split) -> str:
    """A text of more than `length` tokens, if there is so much: items of one kind, in an order that `seed` chooses."""
    rng = random.Random(f"{domain} {seed}")
    parts, characters = [], 0
    for part in _items(domain, rng, split, tokenizer):
        parts.append(part)
        characters += len(part)
        if characters >= CHARACTERS_PER_TOKEN * length:
            break
    return "\n\n".join(parts)


def _items(domain: str, rng: random.Random, split: Split, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if domain == "maths":
        while True:
            problem = _problem(rng)
            if _half(problem) == split:
                yield problem
    sources = list((_code if domain == "code" else prose)(split).items())
    rng.shuffle(sources)
    for name, text in sources:
        if domain == "qa":
            yield from _asked(text, rng)
        else:
            yield _dialogue(name, text, tokenizer) if domain == "chat" else text


def _half(name: str) -> Split:
    return "calibration" if hashlib.sha256(name.encode()).digest()[0] < 128 else "heldout"


def _split(sources: dict[str, str], split: Split) -> dict[str, str]:
    """The items of one half; the second half without any paragraph that the first one has."""
    mine = {name: text for name, text in sources.items() if _half(name) == split}
    if split == "calibration":
        return mine
    seen = {p for name, text in sources.items() if _half(name) == "calibration" for p in paragraphs(text)}
    kept = {name: "\n\n".join(p for p in text.split("\n\n") if p.strip() not in seen) for name, text in mine.items()}
    return {name: text for name, text in kept.items() if text.strip()}


def paragraphs(text: str) -> set[str]:
    """The blocks of a text between blank lines, without surrounding space."""
    return {block.strip() for block in text.split("\n\n")} - {""}


@cache
def prose(split: Split) -> dict[str, str]:
    """The topics of the language reference that belong to one half."""
    return _split({name: text for name, text in sorted(topics.items()) if len(text) > 400}, split)


@cache
def _code(split: Split) -> dict[str, str]:
    """Modules of the standard library, those of 4 to 60 kB."""
    folder = Path(random.__file__).parent
    paths = sorted(path for path in folder.glob("*.py") if 4_000 < path.stat().st_size < 60_000)
    return _split({path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths}, split)


_QUESTIONS = (
    "What does the Python reference say about {}?",
    "Can you explain {} in Python?",
    "Tell me about {}, please.",
)


def _dialogue(name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A question and its answer, in the model's own chat format if it has one."""
    question = _QUESTIONS[len(text) % len(_QUESTIONS)].format(name.replace("-", " "))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text[:1500].strip()}]
    if tokenizer.chat_template is None:
        return f"User: {question}\n\nAssistant: {turns[1]['content']}"
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def _asked(text: str, rng: random.Random) -> Iterator[str]:
    """Passages of a text, each with a question about one of its sentences and the answer, which the passage holds."""
    for paragraph in sorted(paragraphs(text)):
        passage = " ".join(paragraph.split())
        sentences = [s for s in SENTENCE.split(passage) if 8 <= len(s.split()) <= 60]
        if len(sentences) >= 3:
            words = rng.choice(sentences).split()
            yield (
                f'Passage: {passage}\nQuestion: How does the sentence that begins with "{" ".join(words[:4])}" go on?\n'
                f"Answer: {' '.join(words[4:])}"
            )


NAMES = ("Ada", "Bruno", "Chidi", "Dalia", "Emre", "Freya", "Goran", "Hana", "Ines", "Jonas", "Kofi", "Lena")
_THINGS = ("pencils", "bricks", "tickets", "apples", "tiles", "stamps", "marbles", "seedlings", "bolts", "cups")


def _problem(rng: random.Random) -> str:
    """A word problem with its solution worked out."""
    a, b, c, d = (rng.randint(3, 97) for _ in range(4))
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(_THINGS)
    kind = rng.randrange(5)
    if kind == 0:
        return (
            f"Problem. {name} packs {a} boxes with {b} {thing} each and gives {c} {thing} to {other}. How many are left?\n"
            f"Solution. The boxes hold {a} * {b} = {a * b} {thing}. After giving away {c}, {a * b} - {c} = {a * b - c} "
            f"{thing} are left. The answer is {a * b - c}."
        )
    if kind == 1:
        return (
            f"Problem. Solve {a}x + {b} = {a * c + b} for x.\n"
            f"Solution. Subtract {b} from both sides: {a}x = {a * c + b} - {b} = {a * c}. Divide by {a}: x = {c}. "
            f"Check: {a} * {c} + {b} = {a * c + b}. The answer is {c}."
        )
    if kind == 2:
        steps, x, y = [], a * d, b * d
        while y:
            steps.append(f"{x} = {x // y} * {y} + {x % y}")
            x, y = y, x % y
        return (
            f"Problem. Find the greatest common divisor of {a * d} and {b * d}.\n"
            f"Solution. Divide with remainder: {'; '.join(steps)}. The last divisor is {math.gcd(a * d, b * d)}. "
            f"The answer is {math.gcd(a * d, b * d)}."
        )
    if kind == 3:
        total = sum(a + k * b for k in range(8))
        return (
            f"Problem. {name} saves {a} coins in the first week and {b} more in every week than in the one before. How many "
            f"coins are saved after 8 weeks?\nSolution. Week 8 brings {a} + 7 * {b} = {a + 7 * b}. The sum is "
            f"8 * ({a} + {a + 7 * b}) / 2 = {total}. The answer is {total}."
        )
    price = 100 * c
    return (
        f"Problem. A shop sells {thing} at {price} cents and lowers the price by {b} percent for {name}. What does {other} pay "
        f"for {a} at the lower price?\nSolution. {b} percent of {price} is {b * c}. The lower price is {price} - {b * c} = "
        f"{price - b * c}. For {a} {thing}: {a} * {price - b * c} = {a * (price - b * c)}. The answer is {a * (price - b * c)}."
    )
