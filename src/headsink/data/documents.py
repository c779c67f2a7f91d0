"""Documents for calibration and for retrieval accuracy: text with needles, and the continuations of each document.

A document is continued either by the text that follows in its source, or by a question about one needle. The model reads the
document before the question, so a cache that has evicted the needle cannot answer. The two splits use different text and
different forms of needles: `calibration` has passkeys, entries of a JSON table, several needles per question, variables and
questions about a passage; `heldout` has other sentences, lists, constants in code and quotations. Evaluation therefore never
uses the forms of calibration.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headsink.data import corpus
from headsink.data.corpus import NAMES, Domain, Split
from headsink.errors import HeadsinkError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


AFTER = 1000  # tokens of the source after the document, for its continuation
TEXT = "text"  # the form of the continuation by the source's own text
LEAST_LENGTH = 256  # tokens; a shorter document would be mostly needles


@dataclass(frozen=True)
class Question:
    """A question about a document with its answer, which is the last `answer_tokens` of `ids`."""

    form: str
    ids: list[int]
    answer_tokens: int


@dataclass(frozen=True)
class Document:
    """A document (`ids`, including special tokens at its start), the source text that follows it, and questions about it."""

    ids: list[int]
    continuation: list[int]
    questions: list[Question]

    @property
    def continuations(self) -> list[tuple[str, list[int], int]]:
        """Continuations as (form, tokens, number of scored tokens at the end). The source text's first token is not scored."""
        text = (TEXT, self.continuation, len(self.continuation) - 1)
        return [text, *((q.form, q.ids, q.answer_tokens) for q in self.questions)]


class _Probe(NamedTuple):
    """Needles to insert into a text, a question about them, and its answer."""

    needles: list[str]
    question: str
    answer: str


def document(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    split: Split,
    seed: int = 0,
    domains: Sequence[Domain] = ("prose",),
    continuation: int = 256,
) -> Document:
    """Return a document of at most, and close to, `length` tokens, with a question of every form of its split.

    Needles are inserted in random order, evenly spaced, between the paragraphs of `domains`, which follow one another. The text
    of the last domain continues for `continuation` tokens. Needles take at most a third of a document, so a short one has fewer
    questions. The result is deterministic. Raises HeadsinkError if `length` is too short, or longer than the corpus.
    """
    if length < LEAST_LENGTH:
        raise HeadsinkError(f"length: {length} tokens are too few for retrieval probes, {LEAST_LENGTH} are needed")
    rng = random.Random(f"probes {split} {seed} {' '.join(domains)}")

    def encode(text: str, special: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    names = Names(rng)
    probes = [(form, make(rng, names)) for form, make in _FORMS[split].items()]
    sizes = [sum(len(encode(needle + "\n\n")) for needle in probe.needles) for _, probe in probes]
    kept, room = [], length // 3
    for index in rng.sample(range(len(probes)), len(probes)):
        if sizes[index] <= room:
            kept.append(index)
            room -= sizes[index]
    probes = [probes[index] for index in sorted(kept)]
    needles = [needle for _, probe in probes for needle in probe.needles]
    rng.shuffle(needles)
    body, following = _body(tokenizer, length - sum(sizes[index] for index in kept) - 8, split, seed, domains)
    depths = sorted(((n + rng.random()) / len(needles) * len(body) for n in range(len(needles))), reverse=True)
    for depth, needle in zip(depths, needles, strict=True):  # from the end, so that earlier indices stay valid
        body.insert(round(depth), needle)
    ids = encode("\n\n".join(body), special=True)
    if len(ids) > length:
        raise HeadsinkError(f"length: the document has {len(ids)} tokens, over {length}")
    enough = 4 * corpus.CHARACTERS_PER_TOKEN * continuation  # tokens of a table have many characters
    after = encode(f"\n\n{following[:enough]}")[:continuation]
    if len(after) < continuation:
        raise HeadsinkError(
            f"length: the built-in {domains[-1]} ends within {length} + {continuation} tokens; there is no more"
        )
    return Document(ids, after, [_question(form, probe, encode) for form, probe in probes])


def _question(form: str, probe: _Probe, encode: Callable[[str], list[int]]) -> Question:
    question, whole = encode(f"\n\n{probe.question}"), encode(f"\n\n{probe.question}{probe.answer}")
    # A tokenizer may merge the end of the question with the answer, so the answer begins at the first token that differs.
    shared = next((n for n, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
    return Question(form, whole, len(whole) - shared)


def _body(
    tokenizer: PreTrainedTokenizerBase, length: int, split: Split, seed: int, domains: Sequence[Domain]
) -> tuple[list[str], str]:
    """Return paragraphs of at most `length` tokens in total, an equal share per domain, and the text after the last one."""
    body: list[str] = []
    left, following = length, ""
    for n, domain in enumerate(domains):
        room = left // (len(domains) - n)
        paragraphs = corpus.text(domain, tokenizer, room + AFTER, seed=seed, split=split).split("\n\n")
        while paragraphs:
            size = len(tokenizer(paragraphs[0] + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]) + 2
            if size <= room:
                body.append(paragraphs.pop(0))
                room, left = room - size, left - size
                continue
            lines = paragraphs[0].split("\n")
            if len(lines) == 1:
                break
            half = len(lines) // 2  # code has paragraphs of hundreds of lines
            paragraphs[:1] = ["\n".join(lines[:half]), "\n".join(lines[half:])]
        following = "\n\n".join(paragraphs)
    return body, following


# forms


class Names:
    """Names of people, each used once per document."""

    def __init__(self, rng: random.Random):
        self.left = [f"{name} {surname}" for name in NAMES for surname in _SURNAMES]
        rng.shuffle(self.left)

    def next(self) -> str:
        return self.left.pop()


_SURNAMES = ("Abel", "Brandt", "Castro", "Dorn", "Eriksen", "Fuchs", "Grant", "Holm")
_WORDS: dict[Split, tuple[str, ...]] = {
    "calibration": ("marmalade", "lantern", "granite", "thistle", "harbour", "velvet", "saffron", "compass"),
    "heldout": ("snowdrop", "bluebell", "primrose", "lavender", "marigold", "foxglove", "buttercup", "daffodil"),
}
_PLACES = ("Arden", "Belmont", "Corwen", "Dunmore", "Elford", "Farrow", "Garrick", "Haddon", "Ilkley", "Jarrow")
_TRADES = ("painter", "baker", "surveyor", "clockmaker", "carpenter", "botanist", "printer", "weaver")


def _number(rng: random.Random, digits: int = 5) -> str:
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def _hex(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789abcdef", k=8))


def _passkey(rng: random.Random, names: Names) -> _Probe:
    place, value = f"{rng.choice(_PLACES)} {rng.randint(2, 99)}", _number(rng)
    return _Probe(
        [f"The pass key of {place} is {value}. Remember it. {value} is the pass key of {place}."],
        f"What is the pass key of {place}? The pass key of {place} is",
        f" {value}",
    )


def _uuid(rng: random.Random, names: Names) -> _Probe:
    rows = {_hex(rng): _hex(rng) for _ in range(4)}
    table = ",\n".join(f' "{key}": "{value}"' for key, value in rows.items())
    key = rng.choice(list(rows))
    return _Probe(
        [f"JSON data:\n{{\n{table}\n}}"], f'The value of key "{key}" in the JSON data:\n "{key}": "', rows[key]
    )


def _needles(rng: random.Random, names: Names) -> _Probe:
    owner, values = names.next(), [_number(rng, 4) for _ in range(3)]
    return _Probe(
        [f"One of the magic numbers of {owner} is {value}." for value in values],
        f"List all magic numbers of {owner}. One of the magic numbers of {owner} is {values[0]}."
        f" One of the magic numbers of {owner} is {values[1]}. One of the magic numbers of {owner} is",
        f" {values[2]}",
    )


def _variables(rng: random.Random, names: Names) -> _Probe:
    first, second = ("".join(rng.choices(string.ascii_uppercase, k=4)) for _ in range(2))
    value = _number(rng)
    return _Probe(
        [f"VAR {first} = {value}", f"VAR {second} = VAR {first}"],
        f"Which number do the variables hold? VAR {second} = VAR {first}, VAR {first} =",
        f" {value}",
    )


def _passage(rng: random.Random, names: Names) -> _Probe:
    owner, trade, place, word = (
        names.next(),
        rng.choice(_TRADES),
        rng.choice(_PLACES),
        rng.choice(_WORDS["calibration"]),
    )
    return _Probe(
        [
            f"{owner} was a {trade} from {place} who never travelled far. In the last years of the war {owner} kept a dog"
            f" called {word}, and the two were seen at the market every morning."
        ],
        f"Question: What was the name of {owner}'s dog?\nAnswer: {owner} kept a dog called",
        f" {word}",
    )


def _word(rng: random.Random, names: Names) -> _Probe:
    owner, word = names.next(), rng.choice(_WORDS["calibration"])
    return _Probe([f"The special word of {owner} is {word}."], f"The special word of {owner} is", f" {word}")


def _locker(rng: random.Random, names: Names) -> _Probe:
    owner, value = names.next(), _number(rng)
    return _Probe(
        [f"Note: the locker that belongs to {owner} opens with {value}."],
        f"Reminder: the locker that belongs to {owner} opens with",
        f" {value}",
    )


def _flower(rng: random.Random, names: Names) -> _Probe:
    owner, word = names.next(), rng.choice(_WORDS["heldout"])
    return _Probe(
        [f"Everybody knew that the favourite flower of {owner} was the {word}."],
        f"Question: Which flower did {owner} like most?\nAnswer: The favourite flower of {owner} was the",
        f" {word}",
    )


def _stored(rng: random.Random, names: Names) -> _Probe:
    items = rng.sample(range(100, 999), 3)
    shelves = [rng.choice("ABCDEFGH") + _number(rng, 4) for _ in items]
    lines = [f"Item {item} is stored at {shelf}." for item, shelf in zip(items, shelves, strict=True)]
    return _Probe(lines, f"Where is it? Item {items[0]} is stored at", f" {shelves[0]}")


def _directory(rng: random.Random, names: Names) -> _Probe:
    people = [names.next() for _ in range(3)]
    numbers = [f"555-{_number(rng, 4)}" for _ in people]
    lines = "\n".join(f"- {name}: {number}" for name, number in zip(people, numbers, strict=True))
    person = rng.randrange(3)
    return _Probe(
        [f"Telephone list\n{lines}"], f"From the telephone list:\n- {people[person]}: 555-", numbers[person][4:]
    )


def _constant(rng: random.Random, names: Names) -> _Probe:
    name, value = "_".join(word.upper() for word in rng.sample(_SETTINGS, 2)), _number(rng)
    return _Probe([f"# settings\n{name} = {value}"], f"assert {name} ==", f" {value}")


_SETTINGS = ("buffer", "retry", "cache", "queue", "socket", "worker", "batch", "limit", "timeout", "offset", "depth")


def _quote(rng: random.Random, names: Names) -> _Probe:
    owner, trade, place = names.next(), rng.choice(_TRADES), rng.choice(_PLACES)
    what, end = rng.choice(_CLAIMS), rng.choice(_ENDS)
    said = f"a {trade} in {place} should {what} before {end}"
    words = said.split()
    return _Probe(
        [f'{owner} used to say: "{said}".'],
        f'What did {owner} say? {owner} used to say: "{" ".join(words[:5])}',
        f" {' '.join(words[5:])}",
    )


_CLAIMS = ("sell the old ladder", "count the silver spoons", "paint every second door", "learn the names of the birds")
_ENDS = ("the first snow falls", "the guests arrive", "the river rises", "the summer ends")

_FORMS: dict[Split, dict[str, Callable[[random.Random, Names], _Probe]]] = {
    "calibration": {
        "passkey": _passkey,
        "uuid": _uuid,
        "needles": _needles,
        "variables": _variables,
        "passage": _passage,
        "word": _word,
    },
    "heldout": {
        "locker": _locker,
        "flower": _flower,
        "stored": _stored,
        "directory": _directory,
        "constant": _constant,
        "quote": _quote,
    },
}
FORMS: dict[Split, tuple[str, ...]] = {split: tuple(forms) for split, forms in _FORMS.items()}
