"""Run generated code with its tests in a sandboxed process and return whether it passed.

The process runs this file as a script that imports only the standard library. It sets its own limits, then runs the code.

Limits on Linux:

- 10 seconds of CPU time and 30 of wall time, after which all its processes are killed;
- at most 16 processes, each with 1 GiB of memory and files of up to 16 MiB;
- a temporary working folder, an empty environment, no input, no output;
- started by root, the code runs as the user nobody;
- where the kernel allows it (namespaces, Landlock): no network, no view of other processes, writes only in its folder.

Not limited: the code can read what the user can read. Where the kernel has none of these features, and on macOS, it can write
and connect as the user can. A verdict of "passed" needs a token that the code is not given, so `sys.exit(0)` and `os._exit(0)`
before the tests end do not pass; code that searches its process for the token could. The sandbox guards against the mistakes of a
model, not against an attacker.
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
SECONDS = 30  # of wall time
MEMORY = 1 << 30
FILE_SIZE = 1 << 24
PROCESSES = 16
REASON = 200  # maximum characters of a verdict's reason

NOBODY = 65534
NEW_USER, NEW_IPC, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x08000000, 0x20000000, 0x40000000  # linux/sched.h
NO_NEW_PRIVILEGES, DEATH_SIGNAL, KEEP_CAPABILITIES = 38, 1, 8  # linux/prctl.h
# linux/capability.h: version, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
CAPABILITIES, ACCESS_ANYTHING, READ_ANYTHING = 0x20080522, 1 << 1, 1 << 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls of Landlock, the same on every architecture
WRITING = 0b1_1111_1111_0010  # linux/landlock.h: write, remove and make files of all kinds
TRUNCATING, SINCE = 1 << 14, 3  # the right to truncate, and the version of Landlock that has it
BENEATH = 1  # rule type: everything beneath a folder


@dataclass(frozen=True)
class Verdict:
    """passed: all tests ran without an error. reason: "passed", "timed out", or what failed."""

    passed: bool
    reason: str


def judge(solution: str, tests: str, *, cpu_seconds: int = CPU_SECONDS, seconds: float = SECONDS) -> Verdict:
    """Run `solution` and then `tests`, which raise if it is wrong, in one namespace."""
    token = secrets.token_hex(16)
    request = {"token": token, "solution": solution, "tests": tests, "cpu_seconds": cpu_seconds}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
    ):
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-P", "-B", os.path.abspath(__file__)],
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},  # so that sets always have the same order
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = -signal.SIGXCPU
        finally:
            with suppress(ProcessLookupError):  # all processes of the group have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stdout.seek(0)
        found = stdout.read(4 * REASON).decode(errors="replace")
    if found.startswith(token):
        reason = found.removeprefix(token)
        return Verdict(reason == "passed", reason)
    if status == -signal.SIGXCPU:
        return Verdict(False, "timed out")
    return Verdict(False, f"failed: it ended before its tests did, with status {status}")


# in the sandboxed process


def _main() -> None:
    request, verdict = json.load(sys.stdin), os.dup(1)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    _separate()
    child = os.fork()  # process 1 of a new PID namespace: when it ends, the kernel kills all processes that it started
    if not child:
        _limit(request["cpu_seconds"])
        os.write(verdict, (request.pop("token") + _outcome(request["solution"], request["tests"])).encode())
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    if round(usage.ru_utime + usage.ru_stime) >= request["cpu_seconds"]:
        # Process 1 of a namespace ignores some signals, so the child may have ended by another one than SIGXCPU.
        os.kill(os.getpid(), signal.SIGXCPU)
    os._exit(os.waitstatus_to_exitcode(status) & 255)


def _outcome(solution: str, tests: str) -> str:
    space: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(solution, "solution", "exec"), space)  # noqa: S102, the purpose of this process
        exec(compile(tests, "tests", "exec"), space)  # noqa: S102
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"[:REASON].rstrip(": ")
    return "passed"


def _separate() -> None:
    """Enter new network, IPC and PID namespaces, where the kernel allows it."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)  # Linux only
    if unshare is not None:
        unshare(NEW_IPC | NEW_PROCESSES | NEW_NETWORK | (0 if os.geteuid() == 0 else NEW_USER))


def _limit(cpu_seconds: int) -> None:
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
    """Become the user nobody, since the limit on processes does not apply to root, and keep the capability to read files.

    The installed Python may be in a folder that only root can read.
    """
    header, capabilities = (
        ctypes.create_string_buffer(part) for part in (struct.pack("Ii", CAPABILITIES, 0), bytes(24))
    )
    library.capget(header, capabilities)
    permitted = struct.unpack("6I", capabilities.raw[:24])[1]
    reading = permitted & READ_ANYTHING or permitted & ACCESS_ANYTHING
    if reading:
        os.chown(".", NOBODY, NOBODY)
        library.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        library.capset(header, struct.pack("6I", reading, reading, 0, 0, 0, 0))


def _write_only_here(library: Any) -> None:
    """Restrict writing, making and removing files to the working folder, with Landlock."""
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
