"""How answers are judged, and how sure a mean over items is.

Answers are judged as the scorers of the data sets do: GSM8K by its last number; MATH by the normal form of what stands in the
last box or after "The final answer is" (Hendrycks et al.; no algebra: 2x and x*2 differ); SQuAD, HotpotQA and QASPER by words
without case, punctuation and articles: F1 of the words, exact match, and whether the answer is contained.

Intervals are of a bootstrap over items, 95 %. A change is of the same items, so its interval is of the differences, and its p is
of the sign-flip test, two-sided: exact for up to 16 items that differ, 20,000 draws beyond. Where items are right or wrong it
is McNemar's exact test.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

RESAMPLES = 10_000
EXACT = 16  # items that differ, of which all 2^n signs are tried
FLIPS = 20_000


def cut(text: str, stops: Sequence[str]) -> str:
    """What comes before the first of the stops."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


# maths


def last_number(text: str) -> Decimal | None:
    """The number that follows the last "answer is", or the last one of the text."""
    _, told, after = text.rpartition("answer is")
    for part, which in ((after.replace("- ", "-"), 0), (text, -1)) if told else ((text, -1),):
        if found := _NUMBER.findall(part):
            return _decimal(found[which])
    return None


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def same_number(text: str, answer: str) -> bool:
    """Whether the last number of a solution is the answer."""
    return (found := last_number(text)) is not None and found == _decimal(answer)


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}; None if there is none that ends."""
    for start in reversed([found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for place, character in enumerate(text[start:], start):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if not depth:
                return text[start:place].strip()
    return None


def final_answer(text: str) -> str | None:
    """What follows the last "final answer is", else the last box."""
    told = re.findall(r"final answer is:?\s*(.*?)(?:\. I hope|\.?\s*$)", text, re.DOTALL)
    return told[-1].strip() if told else boxed(text)


def normal_maths(answer: str) -> str:
    """An answer of MATH without what does not matter: spaces, units, sizes of brackets, ways to write a fraction."""
    answer = (boxed(answer) or answer).strip(" $\n").rstrip(".").strip("$")
    for pattern, by in _NORMAL:
        answer = re.sub(pattern, by, answer)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", answer):
        answer = answer.replace(",", "")
    if re.fullmatch(r"-?\d*\.\d+", answer):
        answer = f"{Decimal(answer).normalize():f}"
    return r"\frac{1}{2}" if answer == "0.5" else answer


_NORMAL = (
    (r"\\[!,;:> ]|\\q?quad", ""),
    (r"\\(left|right|displaystyle)(?![a-z])", ""),
    (r"\\(?:text|mbox|mathrm|textbf)\{\s*(?:and|or)\s*\}", ","),
    (r"(?<=.)\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\d)?$", ""),  # a unit at the end
    (r"\\(?:text|mbox|mathrm|textbf|textit)\{([^{}]*)\}", r"\1"),
    (r"\^\{?\\circ\}?|\\%|%|\\\$|\$", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\s+", ""),
    (r"\\frac(\w)(\w)", r"\\frac{\1}{\2}"),
    (r"\\frac(\w)\{", r"\\frac{\1}{"),
    (r"\\frac\{([^{}]*)\}(\w)", r"\\frac{\1}{\2}"),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"\\\{|\\\}", ""),
    (r"^\w{1,2}=", ""),  # the name of a variable
    (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
)


def same_maths(text: str, answer: str) -> bool:
    """Whether a solution ends in the answer, in its normal form."""
    return (found := final_answer(text)) is not None and normal_maths(found) == normal_maths(answer)


# words


def normal_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(text: str, answers: Sequence[str], closed: bool = False) -> float:
    """F1 of the words that text and answer share, of the answer that fits best.

    closed: as HotpotQA has it, "yes" and "no" fit nothing but themselves.
    """
    return max(_f1(normal_words(text), normal_words(answer), closed) for answer in answers)


def _f1(given: list[str], answer: list[str], closed: bool) -> float:
    if closed and given != answer and any(words in (["yes"], ["no"]) for words in (given, answer)):
        return 0.0
    shared = (Counter(given) & Counter(answer)).total()
    return 2 * shared / (len(given) + len(answer)) if given and answer else float(given == answer)


def exact(text: str, answers: Sequence[str]) -> float:
    """1 if the words are those of an answer, else 0."""
    return float(any(normal_words(text) == normal_words(answer) for answer in answers))


def contains(text: str, answers: Sequence[str]) -> float:
    """1 if an answer's words stand in the text, one after the other, else 0."""
    given = f" {' '.join(normal_words(text))} "
    return float(any(f" {' '.join(normal_words(answer))} " in given for answer in answers))


# over items


def interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """The 95 % interval of a mean: items are drawn again with replacement."""
    import torch  # here: the names of tasks are needed without it

    of = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(of), (RESAMPLES, len(of)), generator=torch.Generator().manual_seed(seed))
    low, high = of[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = float(of.mean())
    return [min(low, mean), max(high, mean)]  # else a constant could miss its mean by rounding


def p_value(changes: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of a mean change of 0: how often it is as far from 0 if each item's sign is by lot."""
    import torch

    moved = torch.tensor([change for change in changes if change], dtype=torch.float64)
    if not len(moved):
        return 1.0
    if len(moved) <= EXACT:
        signs = (torch.arange(2 ** len(moved))[:, None] >> torch.arange(len(moved))) % 2
    else:
        signs = torch.randint(2, (FLIPS, len(moved)), generator=torch.Generator().manual_seed(seed))
    sums = ((2 * signs - 1) * moved).sum(1).abs()
    as_far = int((sums >= moved.sum().abs() - 1e-12 * moved.abs().sum()).sum())
    return as_far / len(sums) if len(moved) <= EXACT else (as_far + 1) / (len(sums) + 1)
