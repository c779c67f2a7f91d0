"""What a user may choose for a plan or a census, and the checks of it that need no model. Light: nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from headsink import corpus
from headsink.corpus import Domain
from headsink.errors import HeadsinkError
from headsink.probes import LEAST_LENGTH

KINDS: tuple[Domain, ...] = (*corpus.DOMAINS, "qa")  # of text that calibration documents can be made of
TAIL = 160  # tokens that may follow a calibration document: with them it fits into the longest context
LEAST_CONTEXT = LEAST_LENGTH + TAIL
CONTINUATION = 256  # tokens of text after a document that quality is measured on
LEAST_QUALITY = 2 * CONTINUATION  # tokens of the shortest context that quality is measured at
FRONTIER_BUDGETS = (0.1, 0.15, 0.25, 0.35, 0.5, 0.75)

QUERIES = 512  # of a text that a census reads: docs/census.md says what reading so few costs
TAU = 0.4  # of the head's median value norm, below which a key can be a floating sink (docs/census.md)
LEAST_TOKENS = 2  # of a text of a census

DOMAIN_RULE = "is not a name of visible characters without . @ : / \\"

CENSUS = "census.json"  # marks the folder of a census
FRONTIER = "frontier.json"  # marks the folder of a frontier


def is_domain(name: object) -> bool:
    r"""Whether a kind of text may be called so. `runs/a@512:code` names one, and charts have expressions with the name."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable() and not set(name) & set(".@:/\\")


def check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise HeadsinkError(f"budget: {budget} is outside (0, 1]; 0.25 keeps a quarter of the KV cache")


def check_max_kl(max_kl: float) -> None:
    if not max_kl > 0:
        raise HeadsinkError(f"max_kl: {max_kl} is not above 0 nats; 0.02 is little")


def check_domains(domains: Sequence[str]) -> tuple[Domain, ...]:
    """The kinds of text that are named, each once. Raises HeadsinkError for one that documents cannot be made of."""
    return _known(domains, KINDS)


def check_census_domains(domains: Sequence[str]) -> tuple[Domain, ...]:
    """The kinds of built-in text that are named, each once. Raises HeadsinkError for an unknown one."""
    return _known(domains, corpus.CENSUS_DOMAINS)


def _known(domains: Sequence[str], kinds: tuple[Domain, ...]) -> tuple[Domain, ...]:
    found = tuple(dict.fromkeys(domains))
    if not found or (wrong := [name for name in found if name not in kinds]):
        given = repr(wrong[0]) if found else "none"
        raise HeadsinkError(f"domains: {given} given; one or more of {', '.join(kinds)}")
    return found  # type: ignore[return-value]


def check_context(shortest: int, longest: int, most: int | None = None) -> None:
    """Raise for a context that no plan can be made for. `most`: the model's maximum, if it is known."""
    right = f"give {LEAST_CONTEXT} or more" if most is None else f"give {LEAST_CONTEXT} to {most}"
    if shortest > longest:
        raise HeadsinkError(f"context: {shortest} to {longest} is no range; the shorter length comes first")
    if shortest < LEAST_CONTEXT:
        raise HeadsinkError(
            f"context: {shortest} tokens are too few: a plan is calibrated on documents of {LEAST_LENGTH} tokens or more, "
            f"followed by up to {TAIL}; {right}"
        )
    if most is not None and longest > most:
        raise HeadsinkError(f"context: {longest} is over the model's maximum of {most} tokens; {right}")


def check_quality(contexts: Sequence[int], most: int | None = None, name: str = "quality_contexts") -> None:
    """Raise for a context that quality cannot be measured at. `most`: the model's maximum, if it is known."""
    right = f"give {LEAST_QUALITY} or more" if most is None else f"give {LEAST_QUALITY} to {most}"
    for context in contexts:
        if context < LEAST_QUALITY:
            raise HeadsinkError(
                f"{name}: {context} tokens are too few: quality is measured on {CONTINUATION} tokens after a text that is as "
                f"long or longer; {right}"
            )
        if most is not None and context > most:
            raise HeadsinkError(f"{name}: {context} is over the model's maximum of {most} tokens; {right}")


def check_lengths(lengths: Sequence[int], most: int | None = None) -> None:
    """Raise for a length that a census cannot read. `most`: the model's maximum, if it is known."""
    for length in lengths:
        if length < LEAST_TOKENS:
            raise HeadsinkError(f"lengths: {length} is too short, a census needs {LEAST_TOKENS} tokens or more")
        if most is not None and length > most:
            raise HeadsinkError(f"lengths: {length} is over the model's maximum of {most} tokens")


def check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise HeadsinkError(f"tau: {tau} is outside (0, 1]; {TAU} if not given")


def check_census(folder: Path) -> None:
    """Raise for a folder that is no census."""
    if not folder.is_dir():
        raise HeadsinkError(f"{folder}: no such folder; a census is a folder that headsink analyze has written")
    if not (folder / CENSUS).is_file():
        raise HeadsinkError(f"{folder}: not a census folder: it has no {CENSUS}")


def run_parts(name: str) -> tuple[str, int | None, str | None]:
    """Read `runs/a@512:code`: the folder of a census, and a length and a kind of text if they are named."""
    if Path(name).exists() or not (parts := re.fullmatch(r"(.+?)(?:@(\d+))?(?::([^/:@]+))?", name)):
        return name, None, None
    return parts[1], int(parts[2]) if parts[2] else None, parts[3]
