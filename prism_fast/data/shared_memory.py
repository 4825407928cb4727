"""Memory that a worker and its parent share: the one writes messages there, the other reads them where they lie."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

SIZE = 512 << 20  # of a worker; a page of it is memory once it was written
_ALIGNED = 64


class SharedMemory:
    """Of a process and one that is forked after it was made. Raises OSError where there is no room for ``size``.

    A message's place is free again when nothing of the reader's refers to it any more, and the writer was told.
    """

    def __init__(self, size: int = SIZE):
        self._memory = mmap.mmap(-1, size)
        self._taken: dict[int, int] = {}  # the writer's: end by start
        self._lock = threading.Lock()
        self._unused: deque[int] = deque()  # the reader's: starts

    def write(self, parts: Sequence[bytes | memoryview], size: int) -> int | None:
        """Where the parts, of ``size`` bytes together, lie now, one after the other; None where they have no room."""
        with self._lock:
            start = self._gap(size)
            if start is None:
                return None
            self._taken[start] = start + size
        at = start
        for part in parts:
            self._memory[at : at + len(part)] = part
            at += len(part)
        return start

    def _gap(self, size: int) -> int | None:
        """The first, so that few pages are used, and soon again."""
        at = 0
        for start, end in sorted(self._taken.items()):
            if start - at >= size:
                return at
            at = end + -end % _ALIGNED
        return at if at + size <= len(self._memory) else None

    def free(self, starts: Iterable[int]) -> None:
        """The writer may use these places again."""
        with self._lock:
            for start in starts:
                del self._taken[start]

    def read(self, start: int, size: int) -> np.ndarray[Any, Any]:
        """A message, (size,) uint8, not copied."""
        found = np.frombuffer(self._memory, np.uint8, size, start)
        # It may run in any thread, wherever the last reference goes: it takes no lock, and sends nothing.
        weakref.finalize(found, self._unused.append, start).atexit = False
        return found

    def unused(self) -> list[int]:
        """Starts of messages to which nothing refers any more, each once, for the writer's `free`."""
        return [self._unused.popleft() for _ in range(len(self._unused))]
