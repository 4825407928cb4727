"""Batches of a stage, encoded by processes of their own while the one before is trained on.

Which worker encodes a record is told by the record, so that the images it has processed serve the next epoch; but
records of a batch that have an image in common are one worker's, so that it is decoded once. What comes out is the
same, in the same order, whatever the number of workers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from prism_fast import ranks
from prism_fast.data.dataset import Dataset
from prism_fast.data.encode import encoded, own_positions
from prism_fast.data.order import order
from prism_fast.data.workers import DROP, LOOK, Ended, Entry, Worker
from prism_fast.records import DataError, Sample

T = TypeVar("T")

MOST_WORKERS = 8


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
        self._asked: dict[int, Worker | None] = {}  # by position in the sequence; None: records are looked at still
        self._looks: list[_Looks] = []
        self._news = threading.Condition()
        self._workers = [Worker(data, encode, self._looked, self._ended) for _ in range(number_of_workers(workers))]

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
            self._forget(position)
        try:
            return [made for _, made in encoded(self._data, picked, self._encode, lambda i: self._result(start + i))]
        except Ended as error:
            raise DataError(str(error)) from None

    def _ask(self, start: int, number: int, picked: list[int]) -> None:
        entries = {start + i: picked[i] for i in own_positions(picked) if start + i not in self._asked}
        if not entries:
            return
        if len(self._workers) == 1:
            self._asked.update(dict.fromkeys(entries, self._workers[0]))
            return self._workers[0].ask([*entries.items()])
        with self._news:
            self._asked.update(dict.fromkeys(entries))
            self._looks.append(_Looks(entries))
            self._tell([(self._home(index), (position, index)) for position, index in entries.items()], LOOK)

    def _home(self, index: int) -> Worker:
        """Which worker reads a record, of those that this process looks at (`own_positions`)."""
        return self._workers[index // ranks.world() % len(self._workers)]

    def _tell(self, wanted: Iterable[tuple[Worker, Entry]], *what: str) -> None:
        """By one thread at a time, or messages would mix."""
        by_worker: dict[Worker, list[Entry]] = {}
        for worker, entry in wanted:
            by_worker.setdefault(worker, []).append(entry)
        for worker, entries in by_worker.items():
            worker.ask(entries, *what)

    def _looked(self, found: list[tuple[int, list[str]]]) -> None:
        """Of a worker's thread: what it has seen. Records are dealt when all of their batch were seen."""
        with self._news:
            for position, keys in found:
                looks = next(looks for looks in self._looks if position in looks.entries)
                looks.keys[position] = keys
                if len(looks.keys) == len(looks.entries):
                    self._looks.remove(looks)
                    self._deal(looks)
            self._news.notify_all()

    def _deal(self, looks: _Looks) -> None:
        encode, drop = [], []
        for group in together(looks.keys):
            owner = self._home(looks.entries[group[0]])
            for position in group:
                entry = (position, looks.entries[position])
                wanted, home = position in self._asked, self._home(entry[1])
                if wanted:
                    self._asked[position] = owner
                    encode.append((owner, entry))
                if not wanted or owner is not home:
                    drop.append((home, entry))
        self._tell(drop, DROP)
        self._tell(encode)

    def _ended(self) -> None:
        with self._news:
            self._news.notify_all()

    def _result(self, position: int) -> T:
        def fault() -> str | None:
            return next((worker.fault for worker in self._workers if worker.fault is not None), None)

        with self._news:
            self._news.wait_for(lambda: self._asked[position] is not None or fault() is not None)
            worker = self._asked.pop(position)
        if worker is None:
            raise Ended(fault())
        return worker.result(position)

    def _forget(self, position: int) -> None:
        with self._news:
            worker = self._asked.pop(position)
        if worker is not None:
            worker.forget(position)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Looks:
    """A batch's records that workers look at, and what they have told."""

    def __init__(self, entries: Mapping[int, int]):
        self.entries = entries  # position -> number of the record
        self.keys: dict[int, list[str]] = {}


def together(keys: Mapping[int, Sequence[str]]) -> list[list[int]]:
    """Positions in groups that have no image in common, each in order, by their first ones.

    >>> together({0: ["a"], 1: ["b"], 2: [], 3: ["c", "a"], 4: ["c"]})
    [[0, 3, 4], [1], [2]]
    """
    group: dict[int, list[int]] = {}  # by position, and the same list for all of a group
    first: dict[str, int] = {}  # by key, a position that has it
    for position in sorted(keys):
        group[position] = [position]
        for key in keys[position]:
            mine, other = group[position], group[first.setdefault(key, position)]
            if other is not mine:
                other.extend(mine)
                for each in mine:
                    group[each] = other
    distinct = {id(members): sorted(members) for members in group.values()}
    return sorted(distinct.values())
