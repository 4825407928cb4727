"""Batches of a stage, encoded by processes of their own while the one before is trained on.

A worker is forked, so that it has data and tokenizer as they are; it reads, decodes and tokenises with one thread, and
touches neither a GPU nor another process of the run. Which worker encodes a record is told by the record, so that the
images it has processed serve the next epoch. What comes out is the same, in the same order, whatever the number of
workers.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from prism_fast import ranks
from prism_fast.data.dataset import Dataset
from prism_fast.data.encode import encoded, own_positions
from prism_fast.data.order import order
from prism_fast.data.wire import Parts, from_bytes, receive, send, to_parts
from prism_fast.records import DataError, Sample

T = TypeVar("T")

MOST_WORKERS = 8
SOON = 0.005  # seconds after which a worker sends what it has encoded
_Made = tuple[int, bool, Any]  # position in the sequence, whether it failed, what it was encoded to or the failure


def number_of_workers(asked: int | str) -> int:
    """``auto``: a quarter of the cores that this process of the run has to itself, at most MOST_WORKERS; one where that
    is none, but for a process with a single core, which would gain nothing."""
    if asked != "auto":
        return int(asked)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world()))
    cores = len(os.sched_getaffinity(0)) // here
    return min(MOST_WORKERS, max(cores // 4, 1)) if cores > 1 else 0


class Batches(Generic[T]):
    """Entries of the endless shuffled sequence `order` over the first ``count`` records, encoded.

    With ``workers`` the next as many entries are being encoded when a batch is handed out: at most two batches are in
    memory. Close it; a worker also ends when this process does.
    """

    def __init__(self, data: Dataset, count: int, encode: Callable[[Sample], T], seed: int, workers: int | str = 0):
        self.bad = data.bad
        self._data, self._count, self._encode, self._seed = data, count, encode, seed
        self._asked: dict[int, Worker] = {}  # by position in the sequence
        self._workers = [Worker(data, encode) for _ in range(number_of_workers(workers))]

    def take(self, start: int, number: int) -> list[T]:
        """Entries [start, start + number); fewer where some are bad, none where all are.

        A bad record raises, or is counted where skip_bad_records allows it.
        """
        picked = order(self._count, self._seed, start, number)
        if not self._workers:
            return [made for _, made in encoded(self._data, picked, self._encode)]
        self._ask(start, number, picked)
        self._ask(start + number, number, order(self._count, self._seed, start + number, number))
        for position in [at for at in self._asked if not start <= at < start + 2 * number]:
            self._asked.pop(position).forget(position)

        def take(i: int) -> T:
            return self._asked.pop(start + i).result(start + i)

        try:
            return [made for _, made in encoded(self._data, picked, self._encode, take)]
        except Ended as error:
            raise DataError(str(error)) from None

    def _ask(self, start: int, number: int, picked: list[int]) -> None:
        wanted: dict[Worker, list[tuple[int, int]]] = {}
        for i in own_positions(number):
            if start + i not in self._asked:
                worker = self._workers[picked[i] % len(self._workers)]
                self._asked[start + i] = worker
                wanted.setdefault(worker, []).append((start + i, picked[i]))
        for worker, entries in wanted.items():
            worker.ask(entries)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class Worker:
    """A process, and the thread that receives what it makes."""

    remedy = "lower data.workers and --resume"  # where it ends by itself

    def __init__(self, data: Dataset, encode: Callable[[Sample], Any]):
        self._line, theirs = socket.socketpair()
        gc.freeze()  # else the child's collector writes to every page that it shares with this process
        try:
            self.pid = os.fork()  # multiprocessing's processes may not be had by its daemons
        finally:
            gc.unfreeze()
        if self.pid == 0:
            try:
                _work(theirs, self._line, data, encode)
            finally:
                os._exit(1)  # nothing of the parent's is to be cleaned up here
        theirs.close()
        self._exit: int | None = None
        self._done: dict[int, Any] = {}
        self._unwanted: set[int] = set()
        self._fault: str | None = None
        self._news = threading.Condition()
        threading.Thread(target=self._receive, daemon=True).start()

    def ask(self, entries: list[tuple[int, int]]) -> None:
        """[(position, number of its record)], to be encoded in this order."""
        try:
            send(self._line, [json.dumps(entries).encode()])
        except OSError:
            self._ended()

    def result(self, position: int) -> Any:
        with self._news:
            self._news.wait_for(lambda: position in self._done or self._fault is not None)
            if position not in self._done:
                raise Ended(str(self._fault))
            found = self._done.pop(position)
        if isinstance(found, _Failure):
            raise found.error()
        return found

    def forget(self, position: int) -> None:
        """What was asked for and is not wanted after all."""
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
                message: list[_Made] = from_bytes(receive(self._line))
            except (EOFError, OSError):
                return self._ended()
            with self._news:
                for position, failed, made in message:
                    if position in self._unwanted:
                        self._unwanted.remove(position)
                    else:
                        self._done[position] = _Failure(*made) if failed else made
                self._news.notify_all()

    def _ended(self) -> None:
        status = self._wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        why = " (out of memory?)" if status == -signal.SIGKILL else ""
        with self._news:
            self._fault = f"a data worker (process {self.pid}) ended with {how}{why}; {self.remedy}"
            self._news.notify_all()


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


def _work(line: socket.socket, parents: socket.socket, data: Dataset, encode: Callable[[Sample], Any]) -> None:
    """Encodes what is asked for until the parent is gone."""
    parents.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # they reach the whole group; the parent decides
    torch.set_num_threads(1)  # threads of before the fork are not there
    asked: queue.SimpleQueue[list[tuple[int, int]]] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                asked.put(json.loads(receive(line).tobytes()))
            except (EOFError, OSError):
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()  # so that the parent never waits to be heard
    while True:
        made: list[_Made] = []
        entries, since = asked.get(), time.monotonic()
        for number, (position, index) in enumerate(entries, 1):
            try:
                made.append((position, False, encode(data[index])))
            except Exception as error:  # noqa: BLE001  the parent raises it
                made.append((position, True, tuple(_Failure.of(error))))
            # A message wakes the parent: small records go several at once, what takes long goes by itself.
            if number == len(entries) or time.monotonic() - since > SOON:
                try:
                    send(line, _parts(made))
                except OSError:
                    os._exit(0)
                made, since = [], time.monotonic()


def _parts(made: list[_Made]) -> Parts:
    """As a message. What cannot be one is a failure of its own, which the parent raises."""
    try:
        return to_parts(made)
    except Exception as error:  # noqa: BLE001
        return to_parts([(position, True, tuple(_Failure.of(error))) for position, _, _ in made])
