"""Files appear whole or not at all: everything is written beside its place and moved there when it is complete."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from headsink.errors import HeadsinkError


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn what an operating system says about `path` into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors gives the number of a system's error in its text only.
        known = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        number = int(known[1]) if known else getattr(error, "errno", None) or 0
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "no permission to write there",
            errno.EPERM: "no permission to write there",
            errno.EROFS: "the file system is read-only",
            errno.ENOTDIR: "part of the path is a file, not a folder",
            errno.EEXIST: "something of that name is in the way",
        }.get(number, os.strerror(number) if number else str(error))
        raise HeadsinkError(f"cannot write {path}: {reason}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file (UTF-8)."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadsinkError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise if no file can be written at `path`. Call it before long work."""
    path = Path(path)
    if path.is_dir():
        raise HeadsinkError(f"cannot write {path}: it is a folder, name a file")
    _check_writable(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically (UTF-8), making its folder if need be."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file that takes its place when the block ends; an error or ctrl-C in the block leaves nothing. Makes its folder."""
    path = Path(path)
    check_file(path)
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            os.chmod(part, 0o666 & ~_umask())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """Fill a folder that takes its place when the block ends; an error or ctrl-C in the block leaves nothing.

    An older folder at `path` is replaced if it is empty or holds a file called `marker`, so that nobody's other files
    are ever removed.
    """
    path = Path(path)
    check_replaceable(path, marker)
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield part
            os.chmod(part, 0o777 & ~_umask())
            for file in part.iterdir():
                os.chmod(file, 0o666 & ~_umask())
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                os.replace(path, old)
                os.replace(part, path)
                shutil.rmtree(old)
            else:
                os.replace(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def check_replaceable(path: str | os.PathLike[str], marker: str) -> None:
    """Raise if `path` is a file, or a folder with something else in it. Call it before long work."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise HeadsinkError(f"cannot write {path}: it is a file, name a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise HeadsinkError(f"cannot write {path}: the folder holds other files; name a new or an empty one")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if place != path and not place.is_dir():
        raise HeadsinkError(f"cannot write {path}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK):
        raise HeadsinkError(f"cannot write {path}: no permission to write in {place}")


def sha256(*paths: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, or of several one after the other, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
