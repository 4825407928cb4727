"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_aside(target: Path, write: Callable[[Path], None]) -> None:
    """Runs ``write(folder)`` on a folder beside ``target`` and renames it; an earlier ``target`` is replaced."""
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    for path in aside.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    aside.rename(target)
    if old is not None:
        shutil.rmtree(old)


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
