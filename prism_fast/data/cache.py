"""Files that are made once from a data file and kept beside the run: pieces of row groups, and which records are good.

A file is told by where its source lies, its size, its time of change and what was asked of it; where any of them is
another, or the file is damaged, it is made anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prism_fast import ranks
from prism_fast.files import replacing, writing
from prism_fast.records import DataError

BEAT = 5.0  # seconds between signs that the first process is at work


class Cache:
    """A folder for what is made from data files; without one, a temporary folder that goes with this object.

    Several processes: the first makes a file, the others wait for it; who does not see it then (another host's disk)
    makes its own.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def folder(self) -> Path:
        if self._folder is None:
            try:
                self._temporary = tempfile.TemporaryDirectory(prefix="prism-fast-")
            except OSError as error:  # none of the usual places takes a file
                raise DataError(
                    f"no temporary folder can be written ({error.strerror}); choose one by {self.choice}"
                ) from None
            self._folder = Path(self._temporary.name)
        return self._folder

    @property
    def choice(self) -> str:
        """What another folder is chosen by, for a person."""
        return f"{'' if self.is_kept else 'TMPDIR, or by '}data.cache, of data commands --cache"

    @property
    def is_kept(self) -> bool:
        """Whether files are there at the next start."""
        return self._folder is not None and self._temporary is None

    def file(
        self,
        source: Path,
        name: str,
        asked: Any,
        make: Callable[[Path], None],
        said: str | None = None,
        sound: Callable[[Path], bool] = Path.exists,
    ) -> Path:
        """The file that ``make(path)`` writes from ``source``. ``asked``: what else it depends on, as JSON; ``said``:
        a line for a person where it has to be made; ``sound(path)``: whether it need not be. All processes call this
        for the same files."""
        found = self.folder / f"{source.stem[:40]}-{_digest(source, asked)}.{name}"
        with ranks.together():
            if self.is_kept:
                _by_first(lambda: self._made(found, make, said, sound))
            else:
                self._made(found, make, said, sound)
        with ranks.together():
            self._made(found, make, None, sound)
        return found

    def content(self, source: Path, name: str, asked: Any, make: Callable[[], bytes], said: str | None = None) -> bytes:
        """As `file`, of what fits in memory; it is kept with a checksum."""

        def write(target: Path) -> None:
            body = make()
            target.write_bytes(_checksum(body) + body)

        found = self.file(source, name, asked, write, said, lambda path: _body(path) is not None)
        body = _body(found)
        if body is None:  # a disk that does not hold what was written just now
            raise DataError(f"{found}: is not as it was written; choose another folder by {self.choice}")
        return body

    def _made(self, found: Path, make: Callable[[Path], None], said: str | None, sound: Callable[[Path], bool]) -> None:
        if sound(found):
            return
        if said is not None and ranks.is_first():
            print(f"{said}: {found}", file=sys.stderr, flush=True)
        with writing(found, f"folder by {self.choice}"), replacing(found) as aside:
            make(aside)


def _by_first(work: Callable[[], None]) -> None:
    """``work()`` of the first process. However long it takes, no wait of the others is longer than BEAT."""
    if ranks.world() == 1:
        return work()
    if not ranks.is_first():
        while not ranks.gather(None)[0]:
            pass
        return None
    over, fault = threading.Event(), None

    def beat() -> None:
        while not over.wait(BEAT):
            try:
                ranks.gather(False)
            except RuntimeError:  # another process is gone: this one finds it at its next call
                return

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        work()
    except DataError as error:
        fault = error
    finally:
        over.set()
        beating.join()
    ranks.gather(True)
    if fault is not None:
        raise fault
    return None


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=16).digest()


def _body(path: Path) -> bytes | None:
    """What a checksum stands before; None where it is another's."""
    try:
        held = path.read_bytes()
    except OSError:
        return None
    return held[16:] if held[:16] == _checksum(held[16:]) else None


def _digest(source: Path, asked: Any) -> str:
    about = source.stat()
    told = [str(source.resolve()), about.st_size, about.st_mtime_ns, asked]
    return blake2b(json.dumps(told).encode(), digest_size=10).hexdigest()
