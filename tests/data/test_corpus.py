"""Built-in text: repeatable, of the given length, and different in the two halves."""

import pytest

from headsink import HeadsinkError
from headsink.data import corpus, documents


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_no_paragraph_is_in_both_halves(domain):
    source = corpus.prose if domain == "prose" else corpus._code
    halves = [
        {p for text in source(split).values() for p in corpus.paragraphs(text)} for split in ("calibration", "heldout")
    ]
    assert all(halves)
    assert not halves[0] & halves[1]


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_texts_are_repeatable_and_of_the_given_length(domain, tokenizer):
    for split in ("calibration", "heldout"):
        ids = corpus.tokens(domain, tokenizer, 700, seed=3, split=split)
        assert len(ids) == 700
        assert ids == corpus.tokens(domain, tokenizer, 700, seed=3, split=split)
        assert ids != corpus.tokens(domain, tokenizer, 700, seed=4, split=split)
        assert ids[:300] == corpus.tokens(domain, tokenizer, 300, seed=3, split=split)


def test_maths_is_correct(tokenizer):
    """Every equation of plain numbers in the generated solutions is true."""
    import re

    text = tokenizer.decode(corpus.tokens("maths", tokenizer, 12_000, seed=0, split="heldout"))
    equations = re.findall(r"(?<![\w.+*/-] )(?<!\d)(\d+(?: [*+-] \d+)+) = (\d+)(?![\d. ]*[*+/-] ?\d)", text)
    assert len(equations) > 50
    for left, right in equations:
        assert eval(left) == int(right), (left, right)  # digits and operators only


LENGTH = 1500


def document(tokenizer, split="heldout", domain="prose", **options):
    return documents.document(tokenizer, LENGTH, split=split, domains=(domain,), **options)


@pytest.mark.parametrize("split", ["calibration", "heldout"])
@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_documents_contain_the_answers_and_have_the_given_length(split, domain, tokenizer):
    made = document(tokenizer, split, domain)
    assert 0.85 * LENGTH <= len(made.ids) <= LENGTH
    assert [question.form for question in made.questions] == list(documents.FORMS[split])
    text = tokenizer.decode(made.ids)
    for question in made.questions:
        answer = tokenizer.decode(question.ids[-question.answer_tokens :]).strip()
        assert len(answer) >= 4
        assert answer in text
        assert answer not in tokenizer.decode(question.ids[: -question.answer_tokens])


def test_needles_are_spread_over_the_document(tokenizer):
    thirds = [0, 0, 0]
    for seed in range(10):
        made = document(tokenizer, seed=seed)
        text = tokenizer.decode(made.ids)
        here = [text.index(tokenizer.decode(q.ids[-q.answer_tokens :]).strip()) / len(text) for q in made.questions]
        assert max(here) - min(here) > 0.3
        for place in here:
            thirds[int(3 * place)] += 1
    assert min(thirds) > 0.2 * sum(thirds)


def test_the_two_halves_use_different_question_forms():
    assert not set(documents.FORMS["calibration"]) & set(documents.FORMS["heldout"])


def test_documents_are_repeatable(tokenizer):
    assert document(tokenizer, seed=3) == document(tokenizer, seed=3)
    assert document(tokenizer, seed=3).ids != document(tokenizer, seed=4).ids


def test_a_special_token_is_only_at_the_start(tokenizer):
    class WithStart:
        """The tokenizer with a token 0 before every text, as in many models."""

        def __call__(self, text, add_special_tokens=True, **options):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    made = document(WithStart())
    assert made.ids[0] == 0
    assert 0 not in [*made.ids[1:], *made.continuation, *(token for q in made.questions for token in q.ids)]


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_the_continuation_is_the_text_that_follows(domain, tokenizer):
    made = document(tokenizer, domain=domain, continuation=100)
    source, before, following = (
        "".join(text.split())  # long paragraphs are split at line ends, so white space differs
        for text in (
            corpus.text(domain, tokenizer, 2 * LENGTH, split="heldout"),
            tokenizer.decode(made.ids),
            tokenizer.decode(made.continuation),
        )
    )
    assert len(made.continuation) == 100
    assert following in source
    place = source.index(following)
    assert source[place - 15 : place] in before


def test_unavailable_text_is_refused(tokenizer):
    with pytest.raises(HeadsinkError, match="domain"):
        corpus.tokens("poems", tokenizer, 10, split="heldout")
    with pytest.raises(HeadsinkError, match="prose has"):
        corpus.tokens("prose", tokenizer, 10_000_000, split="heldout")
    with pytest.raises(HeadsinkError, match="too few"):
        documents.document(tokenizer, 60, split="heldout")
    with pytest.raises(HeadsinkError, match="chat ends"):
        documents.document(tokenizer, 100_000, split="heldout", domains=("chat",))
