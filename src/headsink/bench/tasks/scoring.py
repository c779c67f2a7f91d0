"""Scores of answers, and intervals and p-values of mean scores over items.

Answers are scored as the data sets do:

- GSM8K: the last number.
- MATH: the normal form of the last box, or of the text after "The final answer is" (Hendrycks et al., arXiv 2103.03874). It does
  no algebra: 2x and x*2 differ.
- SQuAD, HotpotQA, QASPER: F1 of the words, exact match and containment, without case, punctuation and articles.

Intervals are 95 % bootstrap intervals over items. A change is measured on the same items, so its interval is that of the
differences. Its p is that of the two-sided sign-flip test: exact for up to 16 items that differ, 20,000 random draws for more.
For scores of 0 and 1 this is McNemar's exact test.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

RESAMPLES = 10_000
EXACT = 16  # up to so many items that differ, try all 2^n signs
FLIPS = 20_000


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


# maths


def last_number(text: str) -> Decimal | None:
    """Return the number after the last "answer is", else the last number of the text, else None."""
    _, phrase, after = text.rpartition("answer is")
    for part, which in ((after.replace("- ", "-"), 0), (text, -1)) if phrase else ((text, -1),):
        if found := _NUMBER.findall(part):
            return _decimal(found[which])
    return None


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def same_number(text: str, answer: str) -> bool:
    """Return whether the last number of a solution is the answer."""
    return (found := last_number(text)) is not None and found == _decimal(answer)


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None


def boxed(text: str) -> str | None:
    r"""Return the content of the last closed \boxed{...}, None if there is none."""
    for start in reversed([found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for index, character in enumerate(text[start:], start):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if not depth:
                return text[start:index].strip()
    return None


def final_answer(text: str) -> str | None:
    """Return the text after the last "final answer is", else the last box, else None."""
    stated = re.findall(r"final answer is:?\s*(.*?)(?:\. I hope|\.?\s*$)", text, re.DOTALL)
    return stated[-1].strip() if stated else boxed(text)


def normal_maths(answer: str) -> str:
    """Normalise an answer of MATH: drop spaces, units and sizes of brackets, write fractions in one form."""
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
    """Return whether the final answer of a solution equals the answer in normal form."""
    return (found := final_answer(text)) is not None and normal_maths(found) == normal_maths(answer)


# words


def normal_words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(text: str, answers: Sequence[str], closed: bool = False) -> float:
    """Return the highest F1 of the words of a text against any of the answers.

    closed: score 0 where text or answer is "yes" or "no" and the two differ, as HotpotQA does.
    """
    return max(_f1(normal_words(text), normal_words(answer), closed) for answer in answers)


def _f1(given: list[str], answer: list[str], closed: bool) -> float:
    if closed and given != answer and any(words in (["yes"], ["no"]) for words in (given, answer)):
        return 0.0
    shared = (Counter(given) & Counter(answer)).total()
    return 2 * shared / (len(given) + len(answer)) if given and answer else float(given == answer)


def exact(text: str, answers: Sequence[str]) -> float:
    """Return 1 if the words are those of an answer, else 0."""
    return float(any(normal_words(text) == normal_words(answer) for answer in answers))


def contains(text: str, answers: Sequence[str]) -> float:
    """Return 1 if the text contains the words of an answer in sequence, else 0."""
    given = f" {' '.join(normal_words(text))} "
    return float(any(f" {' '.join(normal_words(answer))} " in given for answer in answers))


# over items


def interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """Return the 95 % bootstrap interval of a mean over items, [low, high]."""
    import torch  # imported here, because the command line reads the names of tasks without torch

    of = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(of), (RESAMPLES, len(of)), generator=torch.Generator().manual_seed(seed))
    low, high = of[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = float(of.mean())
    return [min(low, mean), max(high, mean)]  # rounding could put the mean of a constant outside


def p_value(changes: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p of a mean change: the share of random signs whose mean is at least as far from 0."""
    import torch

    nonzero = torch.tensor([change for change in changes if change], dtype=torch.float64)
    if not len(nonzero):
        return 1.0
    if len(nonzero) <= EXACT:
        signs = (torch.arange(2 ** len(nonzero))[:, None] >> torch.arange(len(nonzero))) % 2
    else:
        signs = torch.randint(2, (FLIPS, len(nonzero)), generator=torch.Generator().manual_seed(seed))
    sums = ((2 * signs - 1) * nonzero).sum(1).abs()
    extreme = int((sums >= nonzero.sum().abs() - 1e-12 * nonzero.abs().sum()).sum())
    return extreme / len(sums) if len(nonzero) <= EXACT else (extreme + 1) / (len(sums) + 1)
