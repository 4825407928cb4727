"""Files that are whole or not there: written aside, then renamed. Places to write to, tried before the work. The files
that a folder or a pattern of data stands for."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prism_fast.records import DataError

SHARDS = (".parquet", ".jsonl")  # endings of the files of a folder that are its data
_ONE_OF = re.compile(r"(.+)-(\d{2,6})-of-(\d{2,6})(-[0-9a-f]+)?\.\w+")  # as the library datasets names a part
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
    """Has the system write a folder's files, and their names, to the disk; they may be read by whom it lets in."""
    rights = folder.stat().st_mode & 0o666
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            with suppress(OSError):  # file systems without rights
                path.chmod(path.stat().st_mode | rights)  # safetensors writes for the owner alone
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


def shards(path: Path) -> list[Path]:
    """The data files that a folder or a pattern (``*``, ``?``, ``[ab]``, ``**``) stands for, in the order of their
    names; none where ``path`` is a file, or a folder without any.

    Of a folder: the parquet and JSON-lines files in it, or else in its ``data``, but those with a dot or an underscore
    in front. Raises DataError for a pattern that nothing fits, files of several splits, and a set that is not whole.
    """
    if path.is_dir():
        found = next(filter(None, (_data_files(folder) for folder in (path, path / "data"))), [])
    elif glob.has_magic(str(path)) and not path.exists():
        found = [file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file()]
        if not found:
            raise DataError(f"{path}: no file fits this pattern; check the path")
    else:
        return []
    found.sort(key=Path.as_posix)
    _refuse_parts(path, found)
    return found


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    names = (name for name in os.listdir(folder) if name.endswith(SHARDS) and name[0] not in "._")
    return [folder / name for name in names if (folder / name).is_file()]


def _refuse_parts(path: Path, found: list[Path]) -> None:
    """Raises where names tell of several splits, or of more files than there are."""
    sets: dict[tuple[Path, str, str], int] = {}
    for file in found:
        if told := _ONE_OF.fullmatch(file.name):
            key = (file.parent, told[1], told[3])
            sets[key] = sets.get(key, 0) + 1
    splits = sorted({split for _, split, _ in sets})
    if len(splits) > 1:
        one = next(folder for folder, split, _ in sets if split == splits[-1]) / f"{splits[-1]}-*"
        raise DataError(f"{path}: holds the splits {', '.join(splits)}; name those that are meant, as {str(one)!r}")
    for (folder, split, total), count in sets.items():
        if count != int(total):
            raise DataError(
                f"{folder}: {count} of {int(total)} files {split}-*-of-{total} are there; download the others, or "
                "name those that are meant one by one"
            )
