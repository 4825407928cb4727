"""Files that are whole or not there: written aside, then renamed. Places to write to, tried before the work."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism_fast.records import DataError

_SYSTEM = re.compile(r"([^:]*)\(os error (\d+)\)")  # how libraries written in Rust word an OSError


def write_aside(target: Path, write: Callable[[Path], None]) -> None:
    """Runs ``write(folder)`` on a folder beside ``target`` and renames it; an earlier ``target`` is replaced.

    Where that fails, nothing of it stays, and ``target`` is as it was.
    """
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        sync(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
        raise
    put_in_place(aside, target)


def sync(folder: Path) -> None:
    """Has the system write a folder's files, and the names of them, to the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def put_in_place(aside: Path, target: Path) -> None:
    """Renames a folder that lies beside ``target``; an earlier ``target`` is replaced."""
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    aside.rename(target)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of folders not all know it
            raise
    finally:
        os.close(opened)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, renamed to ``path`` on success and removed on failure: readers never see half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, *, indent: int | None = None) -> None:
    """``value`` as JSON, by `replacing`."""
    text = json.dumps(value, indent=indent)
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def try_folder(folder: Path, key: str) -> None:
    """Makes ``folder`` and tries to write in it. Raises DataError, naming the setting ``key``, where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_to_write(folder, 16)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unwritable(folder, key, error) from None


def try_new(path: Path, key: str = "out") -> None:
    """Raises DataError where ``path`` exists, or could not be written; makes nothing that stays.

    For results of long work, before it begins: what is there is never overwritten.
    """
    refuse_existing(path, key)
    try:
        _try_to_write(_nearest(path), len(os.fsencode(path.name)) + 12)  # as long as names of what is written aside
    except (OSError, ValueError) as error:
        raise _unwritable(path, key, error) from None


def refuse_existing(path: Path, key: str = "out") -> None:
    """Raises DataError where something is at ``path``."""
    try:
        there = path.is_symlink() or path.exists()
    except (OSError, ValueError) as error:
        raise _unwritable(path, key, error) from None
    if there:
        raise DataError(f"{path}: exists already; choose another {key}, or remove it")


def refuse_unwritable(path: Path, key: str = "out") -> None:
    """Raises DataError where ``path`` could not be made or written to, as far as rights tell; writes nothing."""
    try:
        folder = _nearest(path)
        if not folder.is_dir():
            raise NotADirectoryError
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        raise _unwritable(path, key, error) from None


def _nearest(path: Path) -> Path:
    """``path``, or what of it is there."""
    if "\0" in str(path):
        raise ValueError("a NUL in the name")
    found = path.absolute()
    while not found.exists():
        found = found.parent
    return found


def _try_to_write(folder: Path, length: int) -> None:
    with tempfile.NamedTemporaryFile(dir=folder, prefix="." + "x" * max(0, length - 13), suffix=".tmp") as file:
        file.write(b"x" * 4096)
        file.flush()


def _unwritable(path: Path, key: str, error: Exception) -> DataError:
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = "a file is in the way"
    else:
        reason = system_reason(error) or str(error)
    return DataError(f"{path}: cannot be written ({reason}); choose another {key}")


@contextmanager
def writing(place: Path, key: str = "out") -> Iterator[None]:
    """What the system refuses within, in the words of any library, is a DataError that names ``place``."""
    try:
        yield
    except Exception as error:
        reason = system_reason(error)
        if reason is None or isinstance(error, DataError):
            raise
        raise DataError(
            f"{place}: could not be written ({reason}); free space there, or choose another {key}"
        ) from error


def system_reason(error: BaseException) -> str | None:
    """Why the system refused to read or write ("No space left on device"); None for any other error."""
    found = _SYSTEM.search(str(error))
    if found:
        return found.group(1).strip() or os.strerror(int(found.group(2)))
    if not isinstance(error, OSError) or isinstance(error, DataError):
        return None
    return error.strerror or " ".join(str(error).split())[:160] or "I/O error"
