"""Built-in text: repeatable, as long as asked, and never the same in both halves."""

import pytest

from headsink import HeadsinkError, corpus, probes


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_no_paragraph_is_in_both_halves(domain):
    source = corpus.prose if domain == "prose" else corpus._code
    halves = [
        {p for text in source(split).values() for p in corpus.paragraphs(text)} for split in ("calibration", "heldout")
    ]
    assert all(halves)
    assert not halves[0] & halves[1]


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_texts_are_repeatable_and_as_long_as_asked(domain, tokenizer):
    for split in ("calibration", "heldout"):
        ids = corpus.tokens(domain, tokenizer, 700, seed=3, split=split)
        assert len(ids) == 700
        assert ids == corpus.tokens(domain, tokenizer, 700, seed=3, split=split)
        assert ids != corpus.tokens(domain, tokenizer, 700, seed=4, split=split)
        assert ids[:300] == corpus.tokens(domain, tokenizer, 300, seed=3, split=split)


def test_maths_is_right(tokenizer):
    """Every equation of plain numbers in the generated solutions holds."""
    import re

    text = tokenizer.decode(corpus.tokens("maths", tokenizer, 12_000, seed=0, split="heldout"))
    equations = re.findall(r"(?<![\w.+*/-] )(?<!\d)(\d+(?: [*+-] \d+)+) = (\d+)(?![\d. ]*[*+/-] ?\d)", text)
    assert len(equations) > 50
    for left, right in equations:
        assert eval(left) == int(right), (left, right)  # digits and operators only


@pytest.mark.parametrize("split", ["calibration", "heldout"])
@pytest.mark.parametrize("form", probes.FORMS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_probes_hold_their_answer(form, split, depth, tokenizer):
    probe = probes.probe(form, tokenizer, 1500, depth=depth, seed=1, split=split)
    assert 1400 < len(probe.ids) <= 1500
    answer = tokenizer.decode(probe.ids[-probe.answer_tokens :]).strip()
    text = tokenizer.decode(probe.ids[: -probe.answer_tokens])
    assert len(answer) >= 4
    assert answer in text
    place = text.index(answer) / len(text)
    assert abs(place - depth) < 0.2


def test_what_is_not_there_is_refused(tokenizer):
    with pytest.raises(HeadsinkError, match="domain"):
        corpus.tokens("poems", tokenizer, 10, split="heldout")
    with pytest.raises(HeadsinkError, match="prose has"):
        corpus.tokens("prose", tokenizer, 10_000_000, split="heldout")
    with pytest.raises(HeadsinkError, match="too few"):
        probes.probe("number", tokenizer, 60, depth=0.5, split="heldout")
