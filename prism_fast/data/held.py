"""What the files of one data set keep in memory and open between two records: together within a limit."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import pyarrow as pa

from prism_fast.records import DataError

HELD_BYTES = 128 << 20  # of unpacked row groups
HELD_FILES = 64  # that are open: a process may have 1,024, and a data set thousands of shards

T = TypeVar("T")
State = tuple[int, int]  # bytes, time of change


class Held:
    """Row groups and open files, the latest used; the files of a data set share one. Safe to call from threads."""

    def __init__(self, held_bytes: int = HELD_BYTES, held_files: int = HELD_FILES):
        self._held_bytes, self._held_files = held_bytes, held_files
        self._groups: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._lock = Lock()

    def group(self, path: Path, number: int, read: Callable[[], pa.Table]) -> pa.Table:
        """Row group ``number`` of ``path``, which ``read`` gives where it is not held."""
        key = (path, number)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
        table = read()
        with self._lock:
            self._groups[key] = table
            while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > self._held_bytes:
                self._groups.popitem(last=False)
        return table

    def file(self, path: Path, was: State | None, opened: Callable[[Path], T]) -> T:
        """``opened(path)``, or what it gave before.

        ``was``: as `state` told when the file was indexed; raises DataError where it is another file by now.
        """
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        if state(path) != was:
            raise DataError(f"{path}: has changed since it was opened; start again, and leave it as it is meanwhile")
        made = opened(path)
        with self._lock:
            self._files[path] = made
            while len(self._files) > self._held_files:
                self._files.popitem(last=False)
        return made


def state(path: Path) -> State | None:
    """None where it is gone."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns
