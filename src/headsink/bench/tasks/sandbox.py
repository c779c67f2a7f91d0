"""Run the code that a model wrote, with its tests, in a process of its own, and say whether it passed.

The process runs this very file, as a script that imports nothing but the standard library: it bounds itself, then runs the code.
What is contained, on Linux: 10 seconds of CPU and 30 of the clock, after which all its processes are killed; 1 GiB of memory
and 16 MiB of a file for each of at most 16 processes; a folder of its own to work in, an empty environment, no input, no
output. If root runs this, nobody runs the code. Where the kernel allows it (namespaces, Landlock) it has no network, sees no
other processes, and writes nowhere but in its folder. What is not contained: it reads what the user can read; and where the
kernel allows none of that, or on macOS, it writes and connects as the user can. A verdict of "passed" needs a token that the
code is never handed, so `sys.exit(0)` and `os._exit(0)` before the tests end do not pass; code that searches its process for the
token could. It is a guard against the mistakes of a model, not against an attacker.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

CPU_SECONDS = 10
SECONDS = 30  # of the clock
MEMORY = 1 << 30
FILE_SIZE = 1 << 24
PROCESSES = 16
REASON = 200  # characters of it

NOBODY = 65534
NEW_USER, NEW_IPC, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x08000000, 0x20000000, 0x40000000  # linux/sched.h
NO_NEW_PRIVILEGES, DEATH_SIGNAL, KEEP_CAPABILITIES = 38, 1, 8  # linux/prctl.h
CAPABILITIES, ACCESS_ANYTHING, READ_ANYTHING = (
    0x20080522,
    1 << 1,
    1 << 2,
)  # linux/capability.h: its version, and two of them
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls of Landlock, the same on every architecture
WRITING = 0b1_1111_1111_0010  # linux/landlock.h: write, remove and make files of all kinds
TRUNCATING, SINCE = 1 << 14, 3  # and the version of Landlock that knows it
BENEATH = 1  # a rule for all that lies beneath a folder


@dataclass(frozen=True)
class Verdict:
    """passed: all tests ran and held. reason: "passed", "timed out", or what failed."""

    passed: bool
    reason: str


def judge(solution: str, tests: str, *, cpu_seconds: int = CPU_SECONDS, seconds: float = SECONDS) -> Verdict:
    """Run `solution` and then `tests`, which raise if it is wrong, in one namespace."""
    token = secrets.token_hex(16)
    told = {"token": token, "solution": solution, "tests": tests, "cpu_seconds": cpu_seconds}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as said,
    ):
        given.write(json.dumps(told).encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-P", "-B", os.path.abspath(__file__)],
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},  # so that sets have the same order every time
            stdin=given,
            stdout=said,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = -signal.SIGXCPU
        finally:
            with suppress(ProcessLookupError):  # nobody is left of the group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        found = said.read(4 * REASON).decode(errors="replace")
    if found.startswith(token):
        reason = found.removeprefix(token)
        return Verdict(reason == "passed", reason)
    if status == -signal.SIGXCPU:
        return Verdict(False, "timed out")
    return Verdict(False, f"failed: it ended before its tests did, with status {status}")


# in the other process


def _main() -> None:
    told, verdict = json.load(sys.stdin), os.dup(1)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    _separate()
    child = os.fork()  # the first of a new namespace of processes: with it, all that it started will end
    if not child:
        _bound(told["cpu_seconds"])
        os.write(verdict, (told.pop("token") + _outcome(told["solution"], told["tests"])).encode())
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    if round(used.ru_utime + used.ru_stime) >= told["cpu_seconds"]:
        # The first process of a namespace does not die of every signal, so the child's own may be another one.
        os.kill(os.getpid(), signal.SIGXCPU)
    os._exit(os.waitstatus_to_exitcode(status) & 255)


def _outcome(solution: str, tests: str) -> str:
    space: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(solution, "solution", "exec"), space)  # noqa: S102, that is what this process is for
        exec(compile(tests, "tests", "exec"), space)  # noqa: S102
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"[:REASON].rstrip(": ")
    return "passed"


def _separate() -> None:
    """No network and no sight of other processes, where the kernel allows it."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)  # Linux only
    if unshare is not None:
        unshare(NEW_IPC | NEW_PROCESSES | NEW_NETWORK | (0 if os.geteuid() == 0 else NEW_USER))


def _bound(cpu_seconds: int) -> None:
    import resource

    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if os.geteuid() == 0:
            _become_nobody(library)
        library.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        _write_only_here(library)
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for which, limit in limits.items():
        resource.setrlimit(which, (limit, limit))


def _become_nobody(library: Any) -> None:
    """Root is not held to a number of processes, nobody is: become nobody who reads what root can, where Python may be."""
    header, held = (ctypes.create_string_buffer(part) for part in (struct.pack("Ii", CAPABILITIES, 0), bytes(24)))
    library.capget(header, held)
    permitted = struct.unpack("6I", held.raw[:24])[1]
    reading = permitted & READ_ANYTHING or permitted & ACCESS_ANYTHING
    if reading:
        os.chown(".", NOBODY, NOBODY)
        library.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        library.capset(header, struct.pack("6I", reading, reading, 0, 0, 0, 0))


def _write_only_here(library: Any) -> None:
    """Landlock: files are written, made and removed beneath the working folder only."""
    version = library.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    rights = WRITING | (TRUNCATING if version >= SINCE else 0)
    rules = library.syscall(CREATE_RULESET, struct.pack("Q", rights), 8, 0)
    folder = os.open(".", os.O_PATH)
    library.syscall(ADD_RULE, rules, BENEATH, struct.pack("=Qi", rights, folder), 0)
    library.syscall(RESTRICT_SELF, rules, 0)
    os.close(folder)
    os.close(rules)


if __name__ == "__main__":
    _main()
