"""Threading of the compiled CPU kernels: one caller at a time, and a clear error in a forked process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

from headsink.errors import HeadsinkError

_lock = threading.Lock()


_used = False  # whether compiled code has run in parallel in this process


_forked_after_use = False  # whether it had run in the parent before this process was forked


@cache
def numba_installed() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


def after_fork() -> None:
    """Reset the lock in a forked process. The parent's OpenMP threads do not exist here, so torch may use one thread only.

    `DataLoader` sets one thread in its workers, too.
    """
    global _lock, _forked_after_use
    _lock = threading.Lock()
    if _used:
        _forked_after_use = True
        torch.set_num_threads(1)


def usable() -> bool:
    """Whether compiled code may run in this process: it was not forked after compiled code had run (`claim`)."""
    return not _forked_after_use


def claim() -> None:
    """Record that compiled code will run in this process.

    Raises HeadsinkError if the process was forked after compiled code had run, since OpenMP would abort or hang.
    """
    global _used
    if not usable():
        raise HeadsinkError(
            "compiled kernels cannot run in a forked process after the parent used them: start processes with the 'spawn' "
            "method, e.g. multiprocessing.set_start_method('spawn') or DataLoader(multiprocessing_context='spawn')"
        )
    _used = True


@contextmanager
def exclusive_threads() -> Iterator[int]:
    """Yield the number of threads for compiled code, which is torch's. Only one caller at a time is inside the block.

    By default numba would use every processor, and so would torch afterwards, since both share OpenMP's setting. Without OpenMP
    and TBB, numba's own thread pool does not support concurrent calls.
    """
    claim()
    import numba

    threads = torch.get_num_threads()
    with _lock:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            yield threads
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
