"""One process in a run's folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from types import TracebackType

from prism_fast.files import try_folder
from prism_fast.records import DataError

FILE_NAME = "run.lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class FolderLock:
    """Holds ``folder``, which it makes, from ``__enter__`` to ``__exit__`` or the end of the process, however it ends.

    The lock is the kernel's, on ``folder/run.lock``; the file says who holds it and stays when nobody does. Raises
    DataError where another process (or another lock of this one) holds the folder, or nothing can be written there.
    ``supported`` is false on a file system without locks: then nothing is held.
    """

    def __init__(self, folder: Path, key: str = "run.out"):
        self.folder, self.key = folder, key
        self.supported = True
        self._file: int | None = None

    def __enter__(self) -> FolderLock:
        try_folder(self.folder, self.key)
        path = self.folder / FILE_NAME
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps(_holder()).encode() + b"\n")
        except OSError as error:
            holder = self._read() if isinstance(error, BlockingIOError) else ""
            if self._file is not None and error.errno in _NO_LOCKS:
                self.supported = False
                return self
            self.__exit__()
            if isinstance(error, BlockingIOError):
                raise DataError(
                    f"{self.folder}: in use by {holder}; wait for it, stop it, or choose another {self.key}"
                ) from None
            raise DataError(
                f"{path}: cannot be written ({error.strerror}); correct its permissions, or choose another {self.key}"
            ) from None
        _held.add(self._file)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._file is not None:
            _held.discard(self._file)
            os.close(self._file)
            self._file = None

    def _read(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(os.pread(self._file or 0, 4096, 0))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return "another process"  # it has not written its name yet


def _holder() -> dict[str, object]:
    return {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


_held: set[int] = set()


def _leave_to_the_parent() -> None:
    """A forked child must not keep the lock of a parent that was killed."""
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)
