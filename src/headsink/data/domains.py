"""The domains of text, and what a domain may be called."""

from __future__ import annotations

from collections.abc import Sequence

from headsink.data import corpus
from headsink.data.corpus import Domain
from headsink.errors import HeadsinkError

KINDS: tuple[Domain, ...] = (*corpus.DOMAINS, "qa")  # of text that calibration documents can be made of


DOMAIN_RULE = "is not a name of visible characters without . @ : / \\"


def is_domain(name: object) -> bool:
    r"""Whether a kind of text may be called so. `runs/a@512:code` names one, and charts have expressions with the name."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable() and not set(name) & set(".@:/\\")


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
