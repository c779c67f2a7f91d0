"""Threads of the compiled CPU kernels: one caller at a time, and a clear error in a forked process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

from headsink.errors import HeadsinkError

_alone = threading.Lock()


_used = False  # whether compiled code has run in parallel in this process


_orphaned = False  # whether it had in the process that this one was forked from, whose threads are not here


@cache
def compiled() -> bool:
    """Whether there is what the kernels need."""
    return find_spec("numba") is not None


def after_fork() -> None:
    """In a forked process: nobody else holds the lock, and the parent's OpenMP threads, which torch uses too, are gone. With
    one thread torch needs none, which is what `DataLoader` sets in its workers."""
    global _alone, _orphaned
    _alone = threading.Lock()
    if _used:
        _orphaned = True
        torch.set_num_threads(1)


def claim() -> None:
    """Say that compiled code will run in this process. Raises HeadsinkError in one that was forked after it had run: OpenMP would
    end it, or wait for ever."""
    global _used
    if _orphaned:
        raise HeadsinkError(
            "compiled kernels cannot run in a forked process after the parent used them: start processes with the 'spawn' "
            "method, e.g. multiprocessing.set_start_method('spawn') or DataLoader(multiprocessing_context='spawn')"
        )
    _used = True


@contextmanager
def turn() -> Iterator[int]:
    """Within, compiled code may run in parallel: with as many threads as torch, which it gives, and no other call of it beside.

    Left to itself numba takes every processor, and torch after it as well, since OpenMP counts for both. numba's own pool, where
    there is neither OpenMP nor TBB, must not be entered twice.
    """
    claim()
    import numba

    threads = torch.get_num_threads()
    with _alone:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            yield threads
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
