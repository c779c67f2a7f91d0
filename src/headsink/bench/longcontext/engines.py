"""What answers the questions of a suite: headsink under a plan, or a press of kvpress in a process of its own.

An engine reads a document once and compresses it before it sees a question. Then it answers questions, each from the compressed
document alone.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from headsink.attention.formats import KVDtype
from headsink.bench.peers.process import Failed, Process, forget_peak, release_memory, resident_memory
from headsink.bench.stops import Stops
from headsink.cache.cache import nbytes
from headsink.errors import HeadsinkError
from headsink.generation.generate import generate
from headsink.models.devices import dtype_name
from headsink.models.distributed import input_device
from headsink.models.loading import find as find_model
from headsink.plan.plan import Plan
from headsink.runtime.prefill import empty_cache, prefill

KVPRESS = Path(__file__).parents[1] / "peers" / "kvpress_worker.py"
INSTALL = "make .venv-peers/ready, then --kvpress .venv-peers/bin/python"


class Refused(Exception):
    """The engine cannot compress this model's cache to its budget; the message says why."""


@dataclass(frozen=True)
class Document:
    """A document that was read. read_s: seconds of prefill and compression. kv_bytes: of its cache. full_bytes: of the full
    cache in the same engine, None if it is not known there."""

    read_s: float
    kv_bytes: int
    full_bytes: int | None = None


@dataclass(frozen=True)
class Answer:
    """Generated token ids, seconds to the first one after the document was read, and seconds of each later one."""

    ids: list[int]
    first_s: float
    steps_s: list[float]


class Engine(Protocol):
    """An engine with one budget.

    `read` forgets the document before. `answer` needs it, and keeps the compressed document for another question if `keep`.
    `peak_bytes` is the peak memory since the last `read` began, above what the engine's process held then, so without weights;
    None where it is unknown.
    """

    name: str

    def read(self, document: list[int]) -> Document: ...
    def answer(self, question: list[int], tokens: int, stops: Sequence[str], keep: bool) -> Answer: ...
    def peak_bytes(self) -> int | None: ...


def fit(plan: Plan, tokens: int) -> Plan:
    """Return a calibrated plan scaled to a document, so that its budget is that of the document, and any other as it is."""
    return plan.scale(tokens) if "context" in plan.calibration else plan


class HeadsinkEngine:
    """A model under a plan, scaled to each document. reconstruct: compress documents by context reconstruction."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        reconstruct: bool = False,
        kv_dtype: KVDtype = "auto",
    ):
        self.name, self.model, self.tokenizer, self.kv_dtype = name, model, tokenizer, kv_dtype
        self.given = plan.model_copy(update={"quality": ()})  # quality is measured here, so no warning about it
        self.plan = self.given
        self.reconstruct = reconstruct
        self.document: list[int] = []
        self.cache: Cache | None = None
        self.held = 0  # bytes, when the last document began

    def read(self, document: list[int]) -> Document:
        self.cache, self.document = None, document
        self.plan = fit(self.given, len(document))
        self._forget_peak()
        start = perf_counter()
        cache = empty_cache(self.model, self.plan, exact=False, kv_dtype=self.kv_dtype)
        ids = torch.tensor([document], device=input_device(self.model))
        self.cache = prefill(self.model, self.plan, ids, cache=cache, reconstruct=self.reconstruct)
        size = nbytes(self.cache)  # a GPU has finished when the slots are counted
        return Document(perf_counter() - start, size)

    def answer(self, question: list[int], tokens: int, stops: Sequence[str], keep: bool) -> Answer:
        prompt = [*self.document, *question]
        cache = copy.deepcopy(self.cache) if keep else self.cache
        done = generate(
            self.model,
            self.tokenizer,
            prompt,
            self.plan,
            cache=cache,
            max_new_tokens=tokens,
            stopping_criteria=[Stops(self.tokenizer, len(prompt), stops)],
        )
        return Answer(done.ids, done.first_token_s, done.steps_s)

    def peak_bytes(self) -> int | None:
        device = self.model.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_memory(os.getpid())
        return None if peak is None else peak - self.held

    def _forget_peak(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
            self.held = torch.cuda.memory_allocated(self.model.device)
        else:
            release_memory()
            forget_peak(os.getpid())
            self.held = resident_memory(os.getpid(), "VmRSS") or 0


class KvpressEngine:
    """A press of kvpress at a KV budget, in the worker process."""

    def __init__(self, name: str, process: Process, press: str, budget: float):
        self.name, self.process, self.press, self.budget = name, process, press, budget
        self.held = 0  # bytes, when the last document began
        self.peak: int | None = None  # bytes, as the worker reports them on a GPU

    def read(self, document: list[int]) -> Document:
        held = self.process.ask(forget=True)["allocated_bytes"]
        self.process.forget_peak()
        self.held = held or self.process.memory("VmRSS") or 0
        found = self._ask(press=self.press, budget=self.budget, document=document)
        if "refused" in found:
            raise Refused(found["refused"])
        return Document(found["read_s"], found["kv_bytes"], found["kv_bytes_full"])

    def answer(self, question: list[int], tokens: int, stops: Sequence[str], keep: bool) -> Answer:
        found = self._ask(question=question, tokens=tokens, stops=list(stops))
        return Answer(found["ids"], found["first_s"], found["steps_s"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        found = self.process.ask(**request)
        self.peak = found["peak_bytes"]
        return found

    def peak_bytes(self) -> int | None:
        peak = self.peak or self.process.memory()
        return None if peak is None else peak - self.held


def start_kvpress(python: Path, model_name: str, model: PreTrainedModel) -> Process:
    """Start the worker with the Python of an environment that has kvpress. Raises HeadsinkError if there is none."""
    command = (str(python), "-P", str(KVPRESS), find_model(model_name)[0], dtype_name(model.dtype), str(model.device))
    try:
        return Process("kvpress", command, {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    except (OSError, Failed) as error:
        raise HeadsinkError(f"kvpress: {python} does not run it ({error}); {INSTALL}") from error
