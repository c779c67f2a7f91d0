"""Retrieval probes: a fact somewhere in a long text, and a question about it.

A plan must not lose these, and an average over text does not see them. The two halves (`calibration`, `heldout`) differ
in wording, in values and in the text around the fact, so that a plan is not judged on the sentence that it was made with.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

from transformers import PreTrainedTokenizerBase

from headsink import corpus
from headsink.corpus import NAMES, Split
from headsink.errors import HeadsinkError


@dataclass(frozen=True)
class Probe:
    """The last `answer_tokens` of `ids` are the answer, the rest is the text and the question."""

    form: str
    ids: list[int]
    answer_tokens: int


@dataclass(frozen=True)
class _Form:
    """`lead` is what the answer follows. `question`: asked in the model's chat format; none if empty.

    kind: what the values are; decoys: more facts of the same form, about other names.
    """

    fact: str
    lead: str
    kind: Literal["number", "word", "code"]
    question: str = ""
    decoys: int = 0


_FORMS: dict[Split, dict[str, _Form]] = {
    "calibration": {
        "number": _Form(
            "The pass key is {value}. Remember it. {value} is the pass key.",
            "What is the pass key? The pass key is",
            "number",
        ),
        "word": _Form("The special word of {name} is {value}.", "The special word of {name} is", "word"),
        "record": _Form("The code of sample {name} is {value}.", "The code of sample {name} is", "code", decoys=3),
        "question": _Form(
            "{name} has a dog, and its name is {value}.",
            "The name of {name}'s dog is",
            "word",
            question="What is the name of {name}'s dog?",
        ),
    },
    "heldout": {
        "number": _Form(
            "Note: the locker in the hall opens with {value}.", "The locker in the hall opens with", "number"
        ),
        "word": _Form(
            "The favourite flower of {name} is the {value}.", "The favourite flower of {name} is the", "word"
        ),
        "record": _Form("Item {name} is stored at {value}.", "Item {name} is stored at", "code", decoys=3),
        "question": _Form(
            "In the harbour lies a boat called {value}, which belongs to {name}.",
            "{name}'s boat is called",
            "word",
            question="What is {name}'s boat called?",
        ),
    },
}
FORMS = tuple(_FORMS["heldout"])
_WORDS: dict[Split, tuple[str, ...]] = {
    "calibration": ("marmalade", "lantern", "granite", "thistle", "harbour", "velvet", "saffron", "compass"),
    "heldout": ("Snowdrop", "Bluebell", "Primrose", "Lavender", "Marigold", "Foxglove", "Buttercup", "Daffodil"),
}
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


def probe(
    form: str, tokenizer: PreTrainedTokenizerBase, length: int, *, depth: float, seed: int = 0, split: Split
) -> Probe:
    """A probe of at most `length` tokens, and little less, its fact at `depth` (0 to 1) of the text.

    Forms: `number` (a pass key), `word`, `record` (one of four, the others are decoys), `question` (a word asked for in the
    model's chat format). The same arguments give the same probe. Raises HeadsinkError if `length` is too short.
    """
    shape, rng = _FORMS[split][form], random.Random(f"{form} {seed} {depth} {split}")
    names = [f"{rng.choice('KLMN')}{n}" for n in rng.sample(range(100, 999), 1 + shape.decoys)]
    if shape.kind == "word":
        names = rng.sample(NAMES, 1 + shape.decoys)
    values = [_value(shape.kind, split, rng) for _ in names]
    facts = [shape.fact.format(name=name, value=value) for name, value in zip(names, values, strict=True)]
    question, lead = shape.question.format(name=names[0]), shape.lead.format(name=names[0])

    def encode(text: str, special: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def read(paragraphs: list[str]) -> list[int]:
        """Everything before the lead, as tokens."""
        text = "\n\n".join(paragraphs)
        if not question:
            return encode(text + "\n\n", special=True)
        if tokenizer.chat_template is None:
            return encode(f"{text}\n\nQuestion: {question}\nAnswer: ", special=True)
        turn = {"role": "user", "content": f"{text}\n\nQuestion: {question}"}
        return encode(str(tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)))

    asked, answered = encode(lead), encode(f"{lead} {values[0]}")
    # A tokenizer may join the end of the lead to the answer: what differs is the answer.
    shared = next((n for n, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b), len(asked))
    body: list[str] = []
    room = length - len(answered) - len(read(facts))
    for paragraph, size in _fillers(tokenizer, split, rng):
        if size <= room:
            body.append(paragraph)
            room -= size
    if len(body) < 4:
        raise HeadsinkError(f"length: {length} tokens are too few for a retrieval probe")
    ends = list(accumulate(len(paragraph) for paragraph in body))
    places = [sum(end <= depth * ends[-1] for end in ends), *(rng.randint(0, len(body)) for _ in facts[1:])]
    for place, fact in sorted(zip(places, facts, strict=True), reverse=True):  # from the back, so that places hold
        body.insert(place, fact)
    ids = read(body) + answered
    if len(ids) > length:
        raise HeadsinkError(f"length: the probe came to {len(ids)} tokens, over {length}")
    return Probe(form, ids, len(answered) - shared)


def _value(kind: str, split: Split, rng: random.Random) -> str:
    if kind == "word":
        return rng.choice(_WORDS[split])
    return str(rng.randint(10_000, 99_999)) if kind == "number" else rng.choice(_LETTERS) + str(rng.randint(1000, 9999))


def _fillers(tokenizer: PreTrainedTokenizerBase, split: Split, rng: random.Random) -> list[tuple[str, int]]:
    """Paragraphs of prose in random order, with their sizes in tokens, two more than they can take."""
    paragraphs = _paragraphs(split)
    sizes = [len(ids) + 2 for ids in tokenizer([p + "\n\n" for p in paragraphs], add_special_tokens=False)["input_ids"]]
    found = list(zip(paragraphs, sizes, strict=True))
    rng.shuffle(found)
    return found


@cache
def _paragraphs(split: Split) -> list[str]:
    return sorted({p for text in corpus.prose(split).values() for p in corpus.paragraphs(text)})
