"""Options of `headsink bench`, and the checks that need no model. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from headsink.bench.tasks.suites import SUITES
from headsink.bench.tasks.tasks import TASKS
from headsink.data.corpus import Domain
from headsink.data.domains import KINDS, check_domains
from headsink.errors import HeadsinkError
from headsink.evaluation.options import check_budget
from headsink.models.builtin import BUILT_IN, builtin_name, check_name

# Ways of serving that `headsink bench serving` compares, with their names in tables.
SERVERS = {"stock": "stock vLLM", "dense": "plan", "sparse": "plan, sparse prefill"}
NODE_PACKAGE = "npm install --prefix FOLDER node-llama-cpp --ignore-scripts"
CONTEXTS = (512, 2000, 7500)  # tokens of prompts
LEAST_PROMPT = 16  # tokens


@dataclass(frozen=True)
class Options:
    """Options of `headsink bench all`.

    context: tokens, for plans, tasks, suites and domains. contexts, batches: for speed and memory. budget: for domains.
    """

    models: tuple[str, ...] = ("smollm2", "gemma3-270m")
    tasks: tuple[str, ...] = tuple(TASKS)
    suites: tuple[str, ...] = tuple(SUITES)
    items: int = 50
    context: int = 2000
    budgets: tuple[float, ...] = (0.5, 0.25, 0.125)
    budget: float = 0.25
    families: tuple[str, ...] = KINDS
    documents: int = 4
    texts: int = 6
    contexts: tuple[int, ...] = (512, 2000, 7500)
    batches: tuple[int, ...] = (1, 4)
    tokens: int = 33
    rounds: int = 3
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    llama_cpp: Path | None = None
    vllm: Path | None = None

    def command_line(self) -> str:
        """Return the options as typed on the command line, without defaults and with paths replaced by placeholders."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            option = f"--{field.name.replace('_', '-')}"
            if isinstance(value, Path):
                value = option.removeprefix("--").upper()
            elif isinstance(value, tuple):
                value = ",".join(label(one) if isinstance(one, str) else str(one) for one in value)
            words.append(f" {option} {value}")
        return "".join(words)

    def of(self, *names: str) -> dict[str, Any]:
        """Return the named options, for the settings of a row."""
        return {name: getattr(self, name) for name in names}


def label(model: str) -> str:
    """Return a model's name for rows and files: its path without folders."""
    return model if model in BUILT_IN else Path(os.path.abspath(model)).stem


def model_names(given: Sequence[str]) -> tuple[str, ...]:
    """Check the names of models. A built-in model that is not installed is accepted; its rows say that it is missing."""
    return tuple(name if (name := builtin_name(one)) in BUILT_IN else check_name(name) for one in given)


def check_contexts(contexts: Sequence[int], tokens: int, most: int | None = None) -> None:
    """Raise HeadsinkError for a prompt that is too short, or too long for `tokens` more. most: the model's maximum, if known."""
    right = f"give {LEAST_PROMPT} or more" if most is None else f"give {LEAST_PROMPT} to {most - tokens}"
    for context in contexts:
        if context < LEAST_PROMPT:
            raise HeadsinkError(f"contexts: {context} tokens are too few to measure; {right}")
        if most is not None and context + tokens > most:
            raise HeadsinkError(
                f"contexts: {context} and {tokens} new tokens exceed the model's maximum of {most}; {right}"
            )


def contexts_for(most: int, tokens: int) -> list[int]:
    """Return the default contexts that fit the model, or its longest one if none fits."""
    return [n for n in CONTEXTS if n + tokens <= most] or [most - tokens]


def check_families(kinds: Sequence[str], documents: int, texts: int, budget: float) -> tuple[Domain, ...]:
    """Return the domains to compare, without repetitions. Raises HeadsinkError for what cannot be measured."""
    check_budget(budget)
    found = check_domains(kinds)
    if len(found) < 2:
        raise HeadsinkError(f"domains: {found[0]} is only one; give two or more of {', '.join(KINDS)}")
    if texts < 4 or texts % 2:
        raise HeadsinkError(f"texts: {texts} must be even and 4 or more; give 4, 6, ...")
    if documents < 1:
        raise HeadsinkError(f"documents: {documents} is too few; give 1 or more")
    return found
