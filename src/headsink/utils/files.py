"""Atomic writes of files and folders, which never overwrite what headsink did not write.

Output goes to a temporary name in the same folder and is renamed when it is complete. An existing file is replaced only if it is
empty, if headsink wrote it (`is_ours`), or with `force`. Devices, pipes, sockets and links are never replaced. When headsink
rewrites a folder, it removes only the files that the folder's marker lists.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from headsink.errors import HeadsinkError

HEAD = 4096  # bytes of a file that `is_ours` reads
OWN = re.compile(
    rb"""\A(?:
        (?:\xef\xbb\xbf)?\s*\{.*?"headsink"\s*:           # JSON (lines): plans, checkpoints and results name the version
        | \s*\{.*?"command"\s*:\s*"headsink\ bench\       # rows of `headsink bench all`
        | .{8}\{"__metadata__":\{"headsink":              # safetensors: a prefix
        | <!DOCTYPE\ html>.*<meta\ name="generator"\ content="headsink">
        | <svg\ data-generator="headsink"
        | \x89PNG.{33}tEXtSoftware\x00headsink              # after the signature and the first chunk
        | \#\ Results[^\n]*\n\nMade\ by\ `headsink\ bench\      # pages of `bench results`
    )""",
    re.DOTALL | re.VERBOSE,
)
KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed here",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "part of the path is a file, not a folder",
    errno.EEXIST: "something of that name is in the way",
}


# reading


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file (UTF-8, with or without a byte order mark). CR LF becomes LF."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadsinkError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error


def read_input() -> str:
    """Read all of standard input."""
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise HeadsinkError("standard input is not UTF-8 text") from error


def parse_json(text: str, what: str) -> Any:
    """Parse JSON. The error message begins with `what`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeadsinkError(f"{what} is not JSON") from error


def check_text(text: str, what: str) -> None:
    """Raise if the text contains half of a surrogate pair, which neither files nor tokenizers accept."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise HeadsinkError(f"{what} is not text: it holds half of a surrogate pair, or bytes that are not UTF-8")


def sha256(*paths: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the concatenated files, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether headsink wrote this file, judged by its first bytes (OWN)."""
    try:
        with open(path, "rb") as file:
            return OWN.match(file.read(HEAD)) is not None
    except OSError:
        return False


# writing


def reason(error: OSError | SafetensorError) -> str:
    """Return why a write failed. A SafetensorError has the system's error number only in its text."""
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    code = int(number[1]) if number else getattr(error, "errno", None) or 0
    return REASONS.get(code) or getattr(error, "strerror", None) or str(error)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system about `path` into a HeadsinkError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HeadsinkError(f"cannot write {path}: {reason(error)}") from error


def check_file(path: str | os.PathLike[str], force: bool = False) -> None:
    """Raise if no file can be written at `path`, or if headsink did not write the file there. Call it before long work."""
    path = Path(path)
    if (mode := _mode(path)) is not None:
        if stat.S_ISDIR(mode):
            raise HeadsinkError(f"cannot write {path}: it is a folder, name a file")
        if not stat.S_ISREG(mode):
            raise HeadsinkError(f"cannot write {path}: it is {_kind(mode)}, name a file")
        if not force and path.stat().st_size and not is_ours(path):
            raise HeadsinkError(
                f"cannot write {path}: headsink did not write the file that is there; name another one, or give --force "
                "(force=True) to replace it"
            )
    _check_writable(path)


def write_text(path: str | os.PathLike[str], text: str, force: bool = False) -> Path:
    """Write a text file atomically (UTF-8). Creates its folder."""
    with new_file(path, force) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def new_file(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends. An error or ctrl-C leaves no file. Creates the folder."""
    path = Path(path)
    check_file(path, force)
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _temporary_name(path)
        handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)  # as the umask allows; some writers set another mode
        os.close(handle)
        try:
            yield part
            os.chmod(part, mode)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def check_replaceable(path: str | os.PathLike[str], marker: str, force: bool = False) -> None:
    """Raise if `path` is not a folder, or if it has files but no `marker` that lists what headsink wrote there.

    force: also accept a marker of an earlier version, which lists no files. Call it before long work.
    """
    path = Path(path)
    if (mode := _mode(path)) is not None:
        if not stat.S_ISDIR(mode):
            raise HeadsinkError(f"cannot write {path}: it is {_kind(mode)}, name a folder")
        with clear_errors(path):
            filled = any(path.iterdir())
        if filled and not _marker_files(path, marker) and not (force and is_ours(path / marker)):
            raise HeadsinkError(f"cannot write {path}: the folder holds other files; name a new or an empty one")
    _check_writable(path)


@contextmanager
def new_folder(path: str | os.PathLike[str], marker: str, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that is moved to `path` when the block ends. An error or ctrl-C leaves no folder.

    marker: a JSON object that the block writes; the names of the files are added to it. An existing folder is rewritten if it is
    empty or has a marker: files that the marker lists are removed, others stay. force: also replace other files with the name of
    a new one. The marker is written last, so a folder without it is incomplete.
    """
    path = Path(path)
    check_replaceable(path, marker, force)
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _temporary_name(path / "new" if path.exists() else path.absolute())
        part.mkdir()
        mode = stat.S_IMODE(part.stat().st_mode) & 0o666
        try:
            yield part
            names = sorted(file.name for file in part.iterdir())
            found = {"headsink": version("headsink"), "files": names} | json.loads((part / marker).read_text("utf-8"))
            (part / marker).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            for file in part.iterdir():
                os.chmod(file, mode)
            if path.exists():
                _refill(path, part, names, marker, force)
            else:
                os.replace(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # created above under a random name
            raise


def _refill(path: Path, part: Path, names: list[str], marker: str, force: bool) -> None:
    """Replace the files that a folder's marker lists by those of `part`."""
    listed = _marker_files(path, marker)
    for name in names:
        if name not in listed and _mode(path / name) is not None and not (force and (path / name).is_file()):
            raise HeadsinkError(f"cannot write {path}: headsink did not write {name} in it; move it elsewhere")
    for name in [marker, *sorted(listed - {*names})]:
        (path / name).unlink(missing_ok=True)
    for name in [*(name for name in names if name != marker), marker]:
        os.replace(part / name, path / name)
    part.rmdir()


def remove(folder: Path, names: list[str]) -> None:
    """Remove files of a folder by name, and the folder if it is empty then."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _marker_files(folder: Path, marker: str) -> set[str]:
    """Return the files that a folder's marker lists, the marker included; an empty set without a marker."""
    if not is_ours(folder / marker):
        return set()
    try:
        names = {marker, *json.loads((folder / marker).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    named = all(isinstance(name, str) and Path(name).name == name for name in names)
    return {name for name in names if not (folder / name).is_dir()} if named else set()


def _temporary_name(path: Path) -> Path:
    """Return a random hidden name in the folder of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _mode(path: Path) -> int | None:
    """Return the file mode at `path`, without following links; None if nothing is there."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise HeadsinkError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "a file")


def _check_writable(path: Path) -> None:
    """Raise if the folder `path`, or its nearest existing parent, is not writable."""
    nearest = path if path.is_dir() else next(p for p in path.absolute().parents if p.exists())
    if not nearest.is_dir():
        raise HeadsinkError(f"cannot write {path}: {nearest} is a file, not a folder")
    with clear_errors(path), tempfile.TemporaryFile(dir=nearest):
        pass
