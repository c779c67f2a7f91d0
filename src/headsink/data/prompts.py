"""The user's own texts by domain: whole files, files with one prompt per line, JSONL, and command-line arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headsink.data.domains import DOMAIN_RULE, is_domain
from headsink.errors import HeadsinkError
from headsink.utils.files import check_text, parse_json, read_text

OWN = "own"  # the domain of a text without one
TEXT_FIELDS, DOMAIN_FIELDS = ("prompt", "text"), ("domain", "family")


def read(files: Sequence[Path], prompts: Sequence[Path], typed: Sequence[str]) -> dict[str, list[str]] | None:
    """Return {domain: texts}, or None if there are none. The suffix decides whether a file of prompts is JSONL."""
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
    # Split at line feeds only: prompts and JSON strings may contain other Unicode line separators.
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise HeadsinkError(f"prompts: {path} has no prompt in it")
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        return [(OWN, line) for _, line in lines]
    return [_record(path, number, line) for number, line in lines]


def _record(path: Path, number: int, line: str) -> tuple[str, str]:
    """Parse a line of JSONL: an object with the text in `prompt` or `text`, and optionally its domain in `domain` or `family`."""
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
