"""Processes that read and encode records for this one.

A worker is forked, so that it has data and tokenizer as they are; it reads, decodes and tokenises with one thread, and
touches neither a GPU nor another process of the run.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from prism_fast.data.images import content, image_key
from prism_fast.data.shared_memory import SharedMemory
from prism_fast.data.wire import Parts, from_bytes, receive, send, to_parts
from prism_fast.records import DataError, Sample

SOON = 0.005  # seconds after which a worker sends what it has encoded
LOOK, DROP, ENCODE = "look", "drop", "encode"  # what a worker is asked for, in the order in which it is done
MADE, FAILED, LOOKED = range(3)
Entry = tuple[int, int]  # position in the sequence, number of its record
_Answer = tuple[int, int, Any]  # position, MADE, FAILED or LOOKED; what it was encoded to, the failure, image keys
Looked = Callable[[list[tuple[int, list[str]]]], None]  # is told positions, and the keys of their images


class Worker:
    """A process, and the thread that receives what it makes.

    ``looked``, ``ended``: are called from that thread, with what was seen of records, and when the process is gone.
    """

    remedy = "lower data.workers and --resume"  # where it ends by itself

    def __init__(
        self,
        data: Any,
        encode: Callable[[Any], Any],
        looked: Looked | None = None,
        ended: Callable[[], None] | None = None,
    ):
        self._looked, self._told_end = looked, ended
        self._line, theirs = socket.socketpair()
        self._memory = _shared_memory()
        gc.freeze()  # else the child's collector writes to every page that it shares with this process
        try:
            self.pid = os.fork()  # multiprocessing's processes may not be had by its daemons
        finally:
            gc.unfreeze()
        if self.pid == 0:
            try:
                _work(theirs, self._line, self._memory, data, encode)
            finally:
                os._exit(1)  # nothing of the parent's is to be cleaned up here
        theirs.close()
        self._exit: int | None = None
        self._done: dict[int, Any] = {}
        self._unwanted: set[int] = set()
        self.fault: str | None = None
        self._news = threading.Condition()
        threading.Thread(target=self._receive, daemon=True).start()

    def ask(self, entries: Sequence[Entry], what: str = ENCODE) -> None:
        """That records be encoded, in this order; LOOK: that they be read, and the keys of their images told; DROP:
        that what was read for it be given up."""
        try:
            unused = [] if self._memory is None else self._memory.unused()
            send(self._line, [json.dumps([what, entries, unused]).encode()])
        except OSError:
            self._ended()

    def result(self, position: int) -> Any:
        with self._news:
            self._news.wait_for(lambda: position in self._done or self.fault is not None)
            if position not in self._done:
                raise Ended(str(self.fault))
            found = self._done.pop(position)
        if isinstance(found, _Failure):
            raise found.error()
        return found

    def forget(self, position: int) -> None:
        """What was to be encoded and is not wanted after all."""
        with self._news:
            if self._done.pop(position, None) is None:
                self._unwanted.add(position)

    def close(self) -> None:
        with self._news:
            if self._exit is None:
                os.kill(self.pid, signal.SIGTERM)
        self._wait()

    def _wait(self) -> int:
        """Its exit status, once it has ended."""
        with self._news:
            if self._exit is None:
                self._exit = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self._exit

    def _receive(self) -> None:
        while True:
            try:
                message: list[_Answer] = from_bytes(receive(self._line, self._memory))
            except (EOFError, OSError):
                return self._ended()
            looked = [(position, made) for position, state, made in message if state == LOOKED]
            with self._news:
                for position, state, made in message:
                    if state == LOOKED:
                        continue
                    if position in self._unwanted:
                        self._unwanted.remove(position)
                    else:
                        self._done[position] = _Failure(*made) if state == FAILED else made
                self._news.notify_all()
            if looked and self._looked is not None:
                self._looked(looked)

    def _ended(self) -> None:
        status = self._wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        why = " (out of memory?)" if status == -signal.SIGKILL else ""
        with self._news:
            self.fault = f"a data worker (process {self.pid}) ended with {how}{why}; {self.remedy}"
            self._news.notify_all()
        if self._told_end is not None:
            self._told_end()


class Ended(Exception):
    """A worker is gone: a fault of no record, so that none is passed over for it."""


class _Failure(NamedTuple):
    """What a worker could not encode."""

    is_data: bool
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        is_data = isinstance(error, DataError)
        return cls(is_data, str(error) if is_data else "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        return DataError(self.text) if self.is_data else RuntimeError(f"in a data worker:\n{self.text}")


class _Asked:
    """What a worker has still to do: all looks first, since other workers wait for what they tell."""

    def __init__(self) -> None:
        self._left: dict[str, deque[Entry]] = {what: deque() for what in (LOOK, DROP, ENCODE)}
        self._news = threading.Condition()

    def add(self, what: str, entries: Sequence[Entry]) -> None:
        with self._news:
            self._left[what].extend((position, index) for position, index in entries)
            self._news.notify()

    def next(self) -> tuple[str, int, int]:
        """Waits for something to do."""
        with self._news:
            self._news.wait_for(lambda: any(self._left.values()))
            what = next(what for what, entries in self._left.items() if entries)
            return what, *self._left[what].popleft()

    def has(self, what: str) -> bool:
        with self._news:
            return bool(self._left[what])


def _shared_memory() -> SharedMemory | None:
    """None where this process may not have that much: all goes by the socket."""
    try:
        return SharedMemory()
    except OSError:
        return None


def _work(
    line: socket.socket,
    parents: socket.socket,
    memory: SharedMemory | None,
    data: Any,
    encode: Callable[[Any], Any],
) -> None:
    """Does what is asked for until the parent is gone."""
    parents.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # they reach the whole group; the parent decides
    torch.set_num_threads(1)  # threads of before the fork are not there
    asked = _Asked()

    def listen() -> None:
        while True:
            try:
                what, entries, unused = json.loads(receive(line).tobytes())
            except (EOFError, OSError):
                os._exit(0)
            if memory is not None:
                memory.free(unused)
            asked.add(what, entries)

    threading.Thread(target=listen, daemon=True).start()  # so that the parent never waits to be heard
    read: dict[int, Any] = {}  # by position, what was looked at
    made: list[_Answer] = []
    since = 0.0  # when the first of them was begun
    while True:
        what, position, index = asked.next()
        since = since if made else time.monotonic()
        if what == DROP:
            read.pop(position, None)
        elif what == LOOK:
            made.append((position, LOOKED, _look(data, position, index, read)))
        else:
            try:
                made.append((position, MADE, encode(read.pop(position) if position in read else data[index])))
            except Exception as error:  # noqa: BLE001  the parent raises it
                made.append((position, FAILED, tuple(_Failure.of(error))))
        # A message wakes the parent: small records go several at once, what takes long goes by itself.
        if made and (not asked.has(what) or time.monotonic() - since > SOON):
            try:
                send(line, _parts(made), memory)
            except OSError:
                os._exit(0)
            made = []


def _look(data: Any, position: int, index: int, read: dict[int, Any]) -> list[str]:
    """Keys of a record's images, of none where something is wrong with it: whoever encodes it says so."""
    try:
        read[position] = sample = data[index]
        images = [content(ref) for ref in sample.images] if isinstance(sample, Sample) else []
    except Exception:  # noqa: BLE001
        return []
    return [image_key(image).hex() for image in images if image is not None]


def _parts(made: list[_Answer]) -> Parts:
    """As a message. What cannot be one is a failure of its own, which the parent raises."""
    try:
        return to_parts(made)
    except Exception as error:  # noqa: BLE001
        return to_parts([(position, FAILED, tuple(_Failure.of(error))) for position, _, _ in made])
