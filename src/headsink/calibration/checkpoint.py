"""The checkpoint of coordinate descent: the head budgets that were reached for every KV budget, in one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headsink.errors import HeadsinkError
from headsink.utils.files import check_file, write_text


@dataclass(frozen=True)
class Step:
    """Head budgets that coordinate descent reached, as shares of the context. loss: measured. done: whether it is the last."""

    shares: list[float]
    loss: float
    done: bool


class Checkpoint:
    """Steps by budget, written to `path` after each. path: None keeps nothing. key: arguments; steps of others are ignored.

    Raises HeadsinkError if the file is something else than a checkpoint.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]):
        self.path, self.key = path, json.loads(json.dumps(key))
        self._steps = {} if path is None else _read(path, self.key)

    def step(self, budget: float) -> Step | None:
        """The last step of an interrupted descent, or of one that is done."""
        return self._steps.get(str(budget))

    def save(self, budget: float, step: Step) -> None:
        if self.path is not None:
            self._steps[str(budget)] = step
            steps = {name: asdict(one) for name, one in self._steps.items()}
            write_text(self.path, json.dumps({"key": self.key, "steps": steps}))


def check_checkpoint(path: Path) -> None:
    """Raise HeadsinkError if a file is there that is not a checkpoint."""
    check_file(path, force=True)  # the next line checks its contents
    _read(path, {})


def _read(path: Path, key: dict[str, Any]) -> dict[str, Step]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        steps = {budget: Step(**step) for budget, step in content["steps"].items()} if content["key"] == key else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeadsinkError(f"{path}: not a checkpoint of headsink; remove it") from error
    check_file(path)  # it will be replaced
    return steps
