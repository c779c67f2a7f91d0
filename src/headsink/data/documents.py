"""Documents to calibrate on and to judge by: ordinary text with facts strewn in, and what may follow it.

After a document comes either the text that follows in its source, or a question about one of the facts, each by itself.
The document is read before any question is known, so a cache that let go of a fact cannot answer. The two halves have forms
of their own: `calibration` passkeys, keys and values of a table, several needles asked for at once, variables, questions
about a passage; `heldout` other sentences, lists, constants in code and quotations, in other text, so that a plan is not
judged on the forms that it was made with.
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


AFTER = 1000  # tokens of the source beyond the document, for its continuation
TEXT = "text"  # the form of the branch that is the text's own continuation
LEAST_LENGTH = 256  # tokens, below which a document is more facts than text


@dataclass(frozen=True)
class Question:
    """What follows a document. The last `answer_tokens` of `ids` are the answer, the rest asks for it."""

    form: str
    ids: list[int]
    answer_tokens: int


@dataclass(frozen=True)
class Document:
    """A text, special tokens at its start included; the ordinary text that follows it; questions that may follow instead."""

    ids: list[int]
    continuation: list[int]
    questions: list[Question]

    @property
    def branches(self) -> list[tuple[str, list[int], int]]:
        """What may follow: form, tokens, and how many of the last ones are scored; all but the first of the text."""
        text = (TEXT, self.continuation, len(self.continuation) - 1)
        return [text, *((q.form, q.ids, q.answer_tokens) for q in self.questions)]


class _Probe(NamedTuple):
    """Sentences to strew over a text; what is asked, and what the answer is."""

    facts: list[str]
    asked: str
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
    """A document of at most `length` tokens, and little less, with a question of every form of its half.

    Facts lie at even distances in random order, over paragraphs of the kinds of text `domains`, one kind after the other; the
    last one goes on for `continuation` tokens. A short document has fewer questions: facts take at most a third of it. The
    same arguments give the same document. Raises HeadsinkError if `length` is too short, or more than there is.
    """
    if length < LEAST_LENGTH:
        raise HeadsinkError(f"length: {length} tokens are too few for retrieval probes, {LEAST_LENGTH} are needed")
    rng = random.Random(f"probes {split} {seed} {' '.join(domains)}")

    def encode(text: str, special: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    names = Names(rng)
    probes = [(form, make(rng, names)) for form, make in _FORMS[split].items()]
    sizes = [sum(len(encode(fact + "\n\n")) for fact in probe.facts) for _, probe in probes]
    kept, room = [], length // 3
    for index in rng.sample(range(len(probes)), len(probes)):
        if sizes[index] <= room:
            kept.append(index)
            room -= sizes[index]
    probes = [probes[index] for index in sorted(kept)]
    facts = [fact for _, probe in probes for fact in probe.facts]
    rng.shuffle(facts)
    body, following = _body(tokenizer, length - sum(sizes[index] for index in kept) - 8, split, seed, domains)
    places = sorted(((n + rng.random()) / len(facts) * len(body) for n in range(len(facts))), reverse=True)
    for place, fact in zip(places, facts, strict=True):  # from the back, so that places hold
        body.insert(round(place), fact)
    ids = encode("\n\n".join(body), special=True)
    if len(ids) > length:
        raise HeadsinkError(f"length: the document came to {len(ids)} tokens, over {length}")
    enough = 4 * corpus.CHARACTERS_PER_TOKEN * continuation  # a table has wide tokens
    after = encode(f"\n\n{following[:enough]}")[:continuation]
    if len(after) < continuation:
        raise HeadsinkError(
            f"length: the built-in {domains[-1]} ends within {length} + {continuation} tokens; there is no more"
        )
    return Document(ids, after, [_question(form, probe, encode) for form, probe in probes])


def _question(form: str, probe: _Probe, encode: Callable[[str], list[int]]) -> Question:
    asked, whole = encode(f"\n\n{probe.asked}"), encode(f"\n\n{probe.asked}{probe.answer}")
    # A tokenizer may join the end of the question to the answer: what differs is the answer.
    shared = next((n for n, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
    return Question(form, whole, len(whole) - shared)


def _body(
    tokenizer: PreTrainedTokenizerBase, length: int, split: Split, seed: int, domains: Sequence[Domain]
) -> tuple[list[str], str]:
    """Paragraphs of at most `length` tokens in all, an equal share of each kind of text, and the text after the last one."""
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
    """Names of people that no two probes of a document share."""

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
    asked = rng.randrange(3)
    return _Probe(
        [f"Telephone list\n{lines}"], f"From the telephone list:\n- {people[asked]}: 555-", numbers[asked][4:]
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
