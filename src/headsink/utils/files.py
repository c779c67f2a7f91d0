"""Files appear whole or not at all, and nothing is lost that headsink did not write.

Everything is written beside its place and moved there when it is complete. A file that exists is replaced only if it is empty,
if headsink wrote it (`is_own`), or with force; a device, a pipe, a socket or a link never is. In a folder that is written again,
headsink removes the files that it has listed there, in the marker, and nothing else.
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

HEAD = 4096  # bytes of a file that are read to see whether headsink wrote it
OWN = re.compile(
    rb"""\A(?:
        (?:\xef\xbb\xbf)?\s*\{.*?"headsink"\s*:           # JSON (lines): plans, checkpoints and results say the version
        | \s*\{.*?"command"\s*:\s*"headsink\ bench\       # rows of `headsink bench all`
        | .{8}\{"__metadata__":\{"headsink":              # safetensors: a prefix
        | <!DOCTYPE\ html>.*<meta\ name="generator"\ content="headsink">
        | \#\ Results\n\nMade\ by\ `headsink\ bench\      # docs/results.md
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
    """Read a text file (UTF-8, with or without a byte order mark). Lines end in line feeds, also where the file has CR LF."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadsinkError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error


def read_input() -> str:
    """Read standard input to its end."""
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise HeadsinkError("standard input is not UTF-8 text") from error


def parse_json(text: str, what: str) -> Any:
    """Read JSON; `what` begins the line of the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeadsinkError(f"{what} is not JSON") from error


def check_text(text: str, what: str) -> None:
    """Raise if no file and no tokenizer can hold the text: half of a surrogate pair is no character."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise HeadsinkError(f"{what} is not text: it holds half of a surrogate pair, or bytes that are not UTF-8")


def sha256(*paths: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, or of several one after the other, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def is_own(path: str | os.PathLike[str]) -> bool:
    """Whether headsink wrote this file: its first bytes say so, in the way of its kind (OWN)."""
    try:
        with open(path, "rb") as file:
            return OWN.match(file.read(HEAD)) is not None
    except OSError:
        return False


# writing


def reason(error: OSError | SafetensorError) -> str:
    """Why something cannot be written. A SafetensorError has the number of the system's error in its text only."""
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    code = int(number[1]) if number else getattr(error, "errno", None) or 0
    return REASONS.get(code) or getattr(error, "strerror", None) or str(error)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn what an operating system says about `path` into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HeadsinkError(f"cannot write {path}: {reason(error)}") from error


def check_file(path: str | os.PathLike[str], force: bool = False) -> None:
    """Raise if no file can be written at `path`, or one is there that headsink did not write. Call it before long work."""
    path = Path(path)
    if (there := _mode(path)) is not None:
        if stat.S_ISDIR(there):
            raise HeadsinkError(f"cannot write {path}: it is a folder, name a file")
        if not stat.S_ISREG(there):
            raise HeadsinkError(f"cannot write {path}: it is {_kind(there)}, name a file")
        if not force and path.stat().st_size and not is_own(path):
            raise HeadsinkError(
                f"cannot write {path}: headsink did not write the file that is there; name another one, or give --force "
                "(force=True) to replace it"
            )
    _check_writable(path)


def write_text(path: str | os.PathLike[str], text: str, force: bool = False) -> Path:
    """Write a text file atomically (UTF-8), making its folder if need be."""
    with new_file(path, force) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def new_file(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Write a file that takes its place when the block ends; an error or ctrl-C in the block leaves nothing. Makes its folder."""
    path = Path(path)
    check_file(path, force)
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(path)
        handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)  # what the umask leaves; some writers set another
        os.close(handle)
        try:
            yield part
            os.chmod(part, mode)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def check_replaceable(path: str | os.PathLike[str], marker: str, force: bool = False) -> None:
    """Raise if `path` is no folder, or one with something in it but without a `marker` that says what headsink has put there.

    force: a marker of an earlier version, which lists nothing, will do too. Call it before long work.
    """
    path = Path(path)
    if (there := _mode(path)) is not None:
        if not stat.S_ISDIR(there):
            raise HeadsinkError(f"cannot write {path}: it is {_kind(there)}, name a folder")
        with clear_errors(path):
            filled = any(path.iterdir())
        if filled and not _listed(path, marker) and not (force and is_own(path / marker)):
            raise HeadsinkError(f"cannot write {path}: the folder holds other files; name a new or an empty one")
    _check_writable(path)


@contextmanager
def new_folder(path: str | os.PathLike[str], marker: str, force: bool = False) -> Iterator[Path]:
    """Fill a folder that is complete when the block ends; an error or ctrl-C in the block leaves nothing.

    marker: a JSON object that the block writes; the names of the files are added to it. A folder at `path` is filled anew if it
    is empty or has a marker. Files that the marker lists are removed; others stay. force: replace others too where they are in
    the way of new ones. The marker comes last: a folder without it is not complete.
    """
    path = Path(path)
    check_replaceable(path, marker, force)
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(path / "new" if path.exists() else path.absolute())
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
            shutil.rmtree(part, ignore_errors=True)  # made above under a new name
            raise


def _refill(path: Path, part: Path, names: list[str], marker: str, force: bool) -> None:
    """Move the files of `part` into a folder in the place of those that are listed there."""
    listed = _listed(path, marker)
    for name in names:
        if name not in listed and _mode(path / name) is not None and not (force and (path / name).is_file()):
            raise HeadsinkError(f"cannot write {path}: headsink did not write {name} in it; move it elsewhere")
    for name in [marker, *sorted(listed - {*names})]:
        (path / name).unlink(missing_ok=True)
    for name in [*(name for name in names if name != marker), marker]:
        os.replace(part / name, path / name)
    part.rmdir()


def remove(folder: Path, names: list[str]) -> None:
    """Remove files of a folder by their names, and the folder if nothing else is in it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _listed(folder: Path, marker: str) -> set[str]:
    """The files of a folder that its marker lists as headsink's, itself among them; none if there is no such marker."""
    if not is_own(folder / marker):
        return set()
    try:
        names = {marker, *json.loads((folder / marker).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    named = all(isinstance(name, str) and Path(name).name == name for name in names)
    return {name for name in names if not (folder / name).is_dir()} if named else set()


def _beside(path: Path) -> Path:
    """A new hidden name in the folder of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _mode(path: Path) -> int | None:
    """What is at `path` itself, not where a link leads to; None if nothing is."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise HeadsinkError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "a file")


def _check_writable(path: Path) -> None:
    """Raise if nothing can be written in `path`, a folder, or where it will be."""
    place = path if path.is_dir() else next(p for p in path.absolute().parents if p.exists())
    if not place.is_dir():
        raise HeadsinkError(f"cannot write {path}: {place} is a file, not a folder")
    with clear_errors(path), tempfile.TemporaryFile(dir=place):
        pass
