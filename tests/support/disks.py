"""A disk that is full."""

import resource
from contextlib import contextmanager


@contextmanager
def full_disk(bytes_left=1000):
    """Simulate a full disk by a limit on the size of files: the system call fails in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
