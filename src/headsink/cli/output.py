"""What several commands print: where a result lies, and what it took to generate a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headsink.errors import printable
from headsink.utils.terminal import MEGABYTE, out

if TYPE_CHECKING:
    from headsink.generation.generate import Generation


def print_file(what: str, path: Path) -> None:
    """Say where a result lies, after a blank line."""
    out.print(f"\n{what}: {printable(str(path))}", markup=False, highlight=False)


def generated_json(done: Generation) -> dict[str, Any]:
    found = {key: value for key, value in asdict(done).items() if key not in ("ids", "steps_s")}
    return found | {"token_s": done.token_s, "new_tokens": len(done.ids)}


def summarize_generation(done: Generation) -> str:
    drafted = "" if done.acceptance is None else f"; {done.acceptance:.0%} of what the plan drafted was right"
    per_token = "" if done.token_s is None else f", {1000 * done.token_s:.1f} ms per token"
    return (
        f"{done.prompt_tokens} tokens read, {len(done.ids)} written; first after {done.first_token_s:.2f} s{per_token}; "
        f"KV cache {done.kv_bytes / MEGABYTE:.1f} MB{drafted}"
    )
