"""``prism-fast data check``: the stages' own verdicts on every record of a file, by several processes.

Records are judged in runs of AT_ONCE, and what was found is added up in their order: it is the same whatever the
number of processes. No more than two runs a process are under way, and of a record only digests, sizes and lengths are
kept, so that a corpus may be larger than memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prism_fast import printable
from prism_fast.data.cache import Cache
from prism_fast.data.dataset import Records
from prism_fast.data.findings import Findings, as_json, show
from prism_fast.data.held import Held
from prism_fast.data.images import Look
from prism_fast.data.kinds import opened
from prism_fast.data.packing import Packing, packed_steps
from prism_fast.data.parquet import GROUP_BYTES, Parquet
from prism_fast.data.verdicts import Judge, Judged, Picture, judge_of
from prism_fast.data.workers import Ended, Worker
from prism_fast.records import DataError, Sample

if TYPE_CHECKING:
    from prism_fast.data.chat import Chat

AT_ONCE = 64  # records that a process judges before it tells
AHEAD = 2  # such runs that each process is asked for
MOST_PROCESSES = 16


class Reading(NamedTuple):
    """How files are read."""

    columns: Mapping[str, str] = {}
    image_folders: Sequence[Path] = ()
    processes: int | None = None  # None: as many as there are cores, at most MOST_PROCESSES; 0: this one
    cache: Path | None = None  # where what is made of large files stays; None: in a temporary folder

    @property
    def workers(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return min(MOST_PROCESSES, cores if cores > 1 else 0) if self.processes is None else self.processes


PACKING, READING = Packing(), Reading()


def check(
    path: Path,
    console: Console,
    chat: Chat | None = None,
    packing: Packing = PACKING,
    reading: Reading = READING,
    machine: Callable[[dict[str, Any]], None] | None = None,
) -> Findings:
    """Reads every record and opens every image of a file, folder or pattern; with a model's ``chat``, also encodes
    records as their stage would.

    Prints counts, lengths, the first bad records and the first good one; ``machine``: is told them in their place.
    Raises DataError for files that cannot be read at all, and where a process dies.
    """
    held = Held(GROUP_BYTES)  # read from end to end, a row group is not met again
    records, kind = opened(path, reading.columns, reading.image_folders, held, Cache(reading.cache))
    judge, limits = judge_of(kind, chat, packing.max_prompt_tokens)
    found = Findings(str(path), kind, len(records.sources), limits)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        workers = [stack.enter_context(_Checker(records, judge)) for _ in range(reading.workers)]
        bar = stack.enter_context(
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        )  # after the processes were forked: it has a thread
        task = bar.add_task(f"checking {escape(printable(path.name))}", total=len(records))
        for run, verdicts in _verdicts(records, judge, workers):
            _add(found, records, run, verdicts)
            bar.update(task, completed=run.stop)
    found.unread = records.unread
    if found.records:
        found.first = records[found.numbers[0]]
    if packing.plan is not None and len(found.lengths):
        encode = partial(_encoded, found, records, judge)
        found.steps, found.misfit = packed_steps(kind, found.records, found.lengths.longest(), encode, packing)
    if packing.histogram is not None and len(found.lengths):
        found.lengths.plot(packing.histogram, printable(path.name))
    if machine is None:
        show(found, records.place, packing, console)
    else:
        machine(as_json(found, records.place, packing))
    return found


def _encoded(found: Findings, records: Records, judge: Judge, record: int) -> object:
    """A good record, by its number among them."""
    return judge.encode(records[found.numbers[record]], found.pictures(record))


Verdict = str | Judged  # what is wrong with a record, or what there is to count of it


def _verdicts(records: Records, judge: Judge, workers: Sequence[_Checker]) -> Iterator[tuple[range, list[Verdict]]]:
    """(numbers of some records, what is said of each), in the order of records."""
    total = len(records)
    runs = [range(start, min(start + AT_ONCE, total)) for start in range(0, total, AT_ONCE)]
    if not workers:
        for run in runs:
            yield run, judged(records, judge, run)
        return
    for number in range(min(AHEAD * len(workers), len(runs))):
        workers[number % len(workers)].begin(number, runs[number])
    for number, run in enumerate(runs):
        yield run, workers[number % len(workers)].take(number, run)
        if (later := number + AHEAD * len(workers)) < len(runs):
            workers[later % len(workers)].begin(later, runs[later])


def judged(records: Records, judge: Callable[[Sample], Judged], run: range) -> list[Verdict]:
    """What is said of these records."""
    found: list[Verdict] = []
    for number in run:
        try:
            found.append(judge(records[number]))
        except DataError as error:
            found.append(str(error))
    return found


class _Checker(Worker):
    """A process that judges runs of records."""

    remedy = "take fewer --workers"

    def __init__(self, records: Records, judge: Judge):
        self._records = records
        runs: Any = _Runs(len(records))
        told: set[str] = set()

        def work(run: range) -> list[Any]:
            found = [_to_wire(each) for each in judged(records, judge, run)]
            news = sorted(records.unread - told)
            told.update(news)
            return [news, found]

        super().__init__(runs, work)

    def __enter__(self) -> _Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, number: int, run: range) -> None:
        self.ask([(number, run.start)])

    def take(self, number: int, run: range) -> list[Verdict]:
        try:
            unread, told = self.result(number)
        except Ended as error:
            first, last = self._records.place(run[0]), self._records.place(run[-1])
            raise DataError(f"{error}, or look at {first} to {last}, which it had still to do") from None
        self._records.unread.update(unread)
        return [each if isinstance(each, str) else _from_wire(each) for each in told]


class _Runs:
    """The run of records that begins with one."""

    def __init__(self, total: int):
        self._total = total

    def __getitem__(self, start: int) -> range:
        return range(start, min(start + AT_ONCE, self._total))


def _to_wire(verdict: Verdict) -> Any:
    if isinstance(verdict, str):
        return verdict
    pictures = [(digest, tuple(look)) for digest, look in verdict.pictures]
    return tuple(verdict._replace(pictures=pictures))


def _from_wire(told: Sequence[Any]) -> Judged:
    digest, pictures, question_type, unformatted, tree = told
    looks = [Picture(each, Look(tuple(size), format, mode)) for each, (size, format, mode) in pictures]
    return Judged(digest, looks, question_type, unformatted, tree)


def _add(found: Findings, records: Records, run: range, verdicts: Sequence[Verdict]) -> None:
    for number, verdict in zip(run, verdicts, strict=True):
        if isinstance(verdict, Judged):
            found.add(number, verdict)
            continue
        file, record = records.at(number)
        source = records.sources[file]
        group = source.group_of(record) if isinstance(source, Parquet) else None
        found.refuse(source.place(record), verdict, group)
