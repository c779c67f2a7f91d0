"""Finished items of a benchmark, in a file from which an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headsink.errors import HeadsinkError
from headsink.models.devices import dtype_name
from headsink.models.distributed import input_device
from headsink.models.fingerprint import Fingerprint
from headsink.plan.plan import Plan
from headsink.utils.files import check_file, read_text, write_text

Record = dict[str, Any]


def run_settings(model: PreTrainedModel, plans: Mapping[str, Plan], **others: Any) -> dict[str, Any]:
    """Return what finished items depend on: the model, the plans, versions, and others."""
    return others | {
        "model": Fingerprint.of(model).weights,
        "dtype": dtype_name(model.dtype),
        "device": input_device(model).type,
        "plans": {name: hashlib.sha256(plan.to_json().encode()).hexdigest() for name, plan in plans.items()},
        "versions": {name: version(name) for name in ("headsink", "torch", "transformers")},
    }


class Checkpoint:
    """Records of items in a JSON-lines file, whose first line has the settings."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path, self.records = path, dict[str, Record]()
        if path is None:
            return
        check_file(path, force=True)  # the contents are checked below
        lines = read_text(path).split("\n")[:-1] if path.exists() else []  # drops a last line without a line break
        try:
            found = [dict(json.loads(line)) for line in lines]
            self.records = {record["item"]: record for record in found[1:]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise HeadsinkError(f"{path}: not a checkpoint of headsink; remove it") from error
        for key, value in settings.items() if found else ():
            if found[0].get(key) != value:
                raise HeadsinkError(f"{path}: it belongs to a run with another {key}; remove it, or write elsewhere")
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in [settings, *self.records.values()]))

    def add(self, record: Record) -> None:
        self.records[record["item"]] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(record)}\n")
