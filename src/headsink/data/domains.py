"""Domains of text, and the rule for the names of user domains."""

from __future__ import annotations

from collections.abc import Sequence

from headsink.data import corpus
from headsink.data.corpus import Domain
from headsink.errors import HeadsinkError

KINDS: tuple[Domain, ...] = (*corpus.DOMAINS, "qa")  # domains of calibration documents


DOMAIN_RULE = "is not a name of visible characters without . @ : / \\"


def is_domain(name: object) -> bool:
    r"""Whether `name` is allowed for a domain. `runs/a@512:code` refers to one, and charts use the name in expressions."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable() and not set(name) & set(".@:/\\")


def check_domains(domains: Sequence[str]) -> tuple[Domain, ...]:
    """Return the named domains without duplicates. Raises HeadsinkError for one that has no calibration documents."""
    return _check(domains, KINDS)


def check_census_domains(domains: Sequence[str]) -> tuple[Domain, ...]:
    """Return the named domains of the built-in corpus without duplicates. Raises HeadsinkError for an unknown one."""
    return _check(domains, corpus.CENSUS_DOMAINS)


def _check(domains: Sequence[str], kinds: tuple[Domain, ...]) -> tuple[Domain, ...]:
    found = tuple(dict.fromkeys(domains))
    if not found or (wrong := [name for name in found if name not in kinds]):
        given = repr(wrong[0]) if found else "none"
        raise HeadsinkError(f"domains: {given} given; one or more of {', '.join(kinds)}")
    return found  # type: ignore[return-value]
