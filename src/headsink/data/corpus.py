"""The built-in corpus, which needs no download: prose, code, maths, chat, question answering and random tokens.

Prose is Python's language reference (`pydoc_data`), code is the standard library; both are read from the running Python. Chat is
questions about the reference with their answers. Maths is generated problems with worked solutions. Question answering asks for
sentences of a passage of the reference. Random tokens are drawn uniformly from the vocabulary. The hash of an item's name assigns
it to the `calibration` or the `heldout` half. Paragraphs that occur in both halves are removed from the second, so no held-out
text was seen during calibration.
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
DOMAINS: tuple[Domain, ...] = ("prose", "code", "maths", "chat")  # the domains of calibration and evaluation
CENSUS_DOMAINS: tuple[Domain, ...] = (*DOMAINS, "qa", "random")
CHARACTERS_PER_TOKEN = 6  # an upper bound for every tokenizer on this text; the surplus is cut


def tokens(domain: str, tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0, split: Split) -> list[int]:
    """Return a text of exactly `length` tokens, including special tokens at its start.

    The result is deterministic for one version of Python. Raises HeadsinkError if the corpus is too short.
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
            f"length: the built-in {domain} has {len(ids)} tokens, {length} were requested; give your own texts"
        )
    return ids[:length]


def text(domain: str, tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0, split: Split) -> str:
    """Return a text of more than `length` tokens, if the corpus has as many: items of one domain, shuffled by `seed`."""
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
            yield from _passage_questions(text, rng)
        else:
            yield _dialogue(name, text, tokenizer) if domain == "chat" else text


def _half(name: str) -> Split:
    return "calibration" if hashlib.sha256(name.encode()).digest()[0] < 128 else "heldout"


def _split(sources: dict[str, str], split: Split) -> dict[str, str]:
    """Return the items of one half. The held-out half has no paragraph of the calibration half."""
    mine = {name: text for name, text in sources.items() if _half(name) == split}
    if split == "calibration":
        return mine
    seen = {p for name, text in sources.items() if _half(name) == "calibration" for p in paragraphs(text)}
    kept = {name: "\n\n".join(p for p in text.split("\n\n") if p.strip() not in seen) for name, text in mine.items()}
    return {name: text for name, text in kept.items() if text.strip()}


def paragraphs(text: str) -> set[str]:
    """Return the blocks of a text between blank lines, stripped."""
    return {block.strip() for block in text.split("\n\n")} - {""}


@cache
def prose(split: Split) -> dict[str, str]:
    """Return the topics of the language reference in one half."""
    return _split({name: text for name, text in sorted(topics.items()) if len(text) > 400}, split)


@cache
def _code(split: Split) -> dict[str, str]:
    """Return the modules of the standard library in one half, of 4 to 60 kB each."""
    folder = Path(random.__file__).parent
    paths = sorted(path for path in folder.glob("*.py") if 4_000 < path.stat().st_size < 60_000)
    return _split({path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths}, split)


_QUESTIONS = (
    "What does the Python reference say about {}?",
    "Can you explain {} in Python?",
    "Tell me about {}, please.",
)


def _dialogue(name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a question and its answer in the model's chat template, if it has one."""
    question = _QUESTIONS[len(text) % len(_QUESTIONS)].format(name.replace("-", " "))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text[:1500].strip()}]
    if tokenizer.chat_template is None:
        return f"User: {question}\n\nAssistant: {turns[1]['content']}"
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def _passage_questions(text: str, rng: random.Random) -> Iterator[str]:
    """Yield passages of a text, each with a question about one of its sentences, and the answer."""
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
    """Return a random word problem with its worked solution."""
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
