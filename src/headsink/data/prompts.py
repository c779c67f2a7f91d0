"""Texts of the user's own, by kind: whole files, files with a prompt a line, JSONL, and what stands on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headsink.data.domains import DOMAIN_RULE, is_domain
from headsink.errors import HeadsinkError
from headsink.utils.files import check_text, parse_json, read_text

OWN = "own"  # the kind of a text for which none is named
TEXT_FIELDS, DOMAIN_FIELDS = ("prompt", "text"), ("domain", "family")


def read(files: Sequence[Path], prompts: Sequence[Path], typed: Sequence[str]) -> dict[str, list[str]] | None:
    """All of them, {kind: texts}; None if none is given. A file of prompts is JSONL if it is called so."""
    found: dict[str, list[str]] = {}
    for domain, text in [
        *((OWN, read_text(path)) for path in files),
        *(prompt for path in prompts for prompt in _prompts(path)),
        *((OWN, text) for text in typed),
    ]:
        if not text.strip():
            raise HeadsinkError("prompt: one of them is empty")
        check_text(text, "prompt: one of them")
        found.setdefault(domain, []).append(text)
    return found or None


def _prompts(path: Path) -> list[tuple[str, str]]:
    # Line feeds only: the other line separators of Unicode may stand in a prompt, and in a string of JSON.
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise HeadsinkError(f"prompts: {path} has no prompt in it")
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        return [(OWN, line) for _, line in lines]
    return [_record(path, number, line) for number, line in lines]


def _record(path: Path, number: int, line: str) -> tuple[str, str]:
    """A line of JSONL: an object with a text under `prompt` or `text`, and its kind under `domain` or `family` if it has one."""
    record = parse_json(line, f"prompts: line {number} of {path}")
    if isinstance(record, str):
        return OWN, record
    text = next((record[name] for name in TEXT_FIELDS if name in record), None) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise HeadsinkError(f'prompts: line {number} of {path} has no text; write {{"prompt": "...", "domain": "..."}}')
    domain = next((record[name] for name in DOMAIN_FIELDS if name in record), OWN)
    if not is_domain(domain):
        raise HeadsinkError(f"prompts: line {number} of {path}: domain {domain!r} {DOMAIN_RULE}")
    return domain, text
