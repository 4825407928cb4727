"""What the fuzzers of files share: damage by seed, and processes in which a crash, a hang or a blow-up is seen.

A case is a function of (seed, format, number): its fault is printed with the command that shows it again.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SECONDS = 120  # of one case, by the clock: other processes may have the cores
MEMORY = 1 << 30  # bytes of address space that cases may take beside what the process has, unless told otherwise
MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # for files that live for milliseconds
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)

Judge = Callable[[random.Random, Path], str]  # of a case, with a folder of its own: its verdict; a fault is raised


@dataclass
class Tally:
    """Of one format."""

    verdicts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0  # CPU seconds of one case
    memory: int = 0  # bytes that the largest process had beside what it began with

    def line(self, name: str) -> str:
        told = ", ".join(f"{verdict} {count:,}" for verdict, count in sorted(self.verdicts.items()))
        return (
            f"{name}: {sum(self.verdicts.values()):,} cases: {told}; {len(self.faults)} faults; slowest "
            f"{self.slowest:.2f} s of CPU, memory {self.memory >> 20} MB over the start"
        )


def damaged(files: Sequence[bytes], rng: random.Random, from_end: float = 0.0) -> bytes:
    """One of the files with its bits flipped, cut, spliced with another, bytes repeated, numbers set to extremes.

    Half of all damage is in the first 128 bytes, where headers are; the share ``from_end`` in the last 1,024.
    """
    data = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(data), 128) if rng.random() < 0.5 else len(data))
        if from_end and rng.random() < from_end:
            at = rng.randrange(max(0, len(data) - 1024), len(data))
        way = rng.randrange(6)
        if way == 0:
            for _ in range(rng.choice((1, 2, 8, 32))):
                data[rng.randrange(at, len(data))] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[max(at, 1) :]
        elif way == 2:
            other = rng.choice(files)
            data[at:] = other[rng.randrange(len(other)) :]
        elif way == 3:
            data[at:at] = data[at : at + rng.randrange(1, 64)] * rng.choice((1, 2, 16))
        elif way == 4:
            data[at : at + 4] = rng.choice(EXTREMES).to_bytes(4, rng.choice(("little", "big")))
        else:
            del data[at : at + rng.randrange(1, 32)]
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


def case(seed: int, name: str, number: int) -> random.Random:
    return random.Random(f"{seed} {name} {number}")


def run(judge: Judge, name: str, numbers: Iterable[int], seed: int, jobs: int, memory: int = MEMORY) -> Tally:
    """Judges cases in ``jobs`` processes, each replaced where it ends or is late."""
    tally, numbers = Tally(), list(numbers)
    workers = [_Worker(judge, name, numbers[i::jobs], seed, memory) for i in range(jobs)]
    try:
        while workers:
            ready = wait([worker.pipe for worker in workers], timeout=min(1.0, SECONDS))
            for worker in list(workers):
                if worker.pipe in ready:
                    worker.hear(tally)
                elif worker.left and time.monotonic() - worker.since > SECONDS:
                    worker.end(tally, f"a hang: over {SECONDS} s")
                if not worker.left and worker.process.exitcode is not None:
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.process.kill()
    return tally


class _Worker:
    """A process that judges the cases ``left``, in order."""

    def __init__(self, judge: Judge, name: str, numbers: Sequence[int], seed: int, memory: int):
        self._judge, self._name, self._seed, self.left, self._memory = judge, name, seed, list(numbers), memory
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(theirs, self._judge, self._name, self.left, self._seed, self._memory), daemon=True
        )
        self.process.start()
        theirs.close()
        self.since = time.monotonic()

    def hear(self, tally: Tally) -> None:
        try:
            verdict, fault, seconds, memory = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            if self.left:
                self.end(tally, f"a crash: the process ended with {self.process.exitcode}")
            return
        number, self.since = self.left.pop(0), time.monotonic()
        tally.verdicts[verdict] += 1
        tally.slowest, tally.memory = max(tally.slowest, seconds), max(tally.memory, memory)
        if fault:
            tally.faults.append(f"--seed {self._seed} --only {self._name} --case {number}: {fault}")

    def end(self, tally: Tally, why: str) -> None:
        self.process.kill()
        self.process.join()
        number = self.left.pop(0)
        tally.verdicts["FAULT"] += 1
        tally.faults.append(f"--seed {self._seed} --only {self._name} --case {number}: {why}")
        self._start()


def _work(pipe: Connection, judge: Judge, name: str, numbers: Sequence[int], seed: int, memory: int) -> None:
    faulthandler.disable()  # a crash is told by the parent
    before = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (before + memory, before + memory))
    began = _status("VmRSS")
    with tempfile.TemporaryFile() as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)  # C libraries write there too
        for number in numbers:
            started, fault = time.process_time(), ""
            with tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY_DISK) as folder:
                try:
                    verdict = judge(case(seed, name, number), Path(folder))
                except BaseException as error:  # noqa: BLE001 (a panic of Rust is none of Exception)
                    verdict, fault = "FAULT", _told(error)
            sys.stderr.flush()
            if spoken := os.lseek(words.fileno(), 0, os.SEEK_END):
                words.seek(0)
                verdict, fault = "FAULT", f"{fault} it says {words.read(min(spoken, 300))!r}"
                words.seek(0)
                words.truncate()
            pipe.send((verdict, fault, time.process_time() - started, max(0, _status("VmHWM") - began)))


def _told(error: BaseException) -> str:
    places = [f"{Path(at.filename).name}:{at.lineno}" for at in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]!r} at {' < '.join(places[::-1][:5])}"


def _status(name: str) -> int:
    """Bytes, of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def arguments(about: str | None, count: int, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, help="cases of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=names, action="append", help="one format (again: another one too)")
    parser.add_argument("--case", type=int, help="this one alone, here, with its traceback; its folder stays")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main(about: str | None, count: int, formats: dict[str, Callable[[], Judge]], memory: int = MEMORY) -> int:
    """Command line of a fuzzer; ``formats``: what makes the judge of each."""
    asked = arguments(about, count, list(formats))
    faults = 0
    for name in asked.only or formats:
        judge = formats[name]()
        if asked.case is not None:
            folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
            print(folder, flush=True)
            print(judge(case(asked.seed, name, asked.case), folder))
            continue
        tally = run(judge, name, range(asked.count), asked.seed, asked.jobs, memory)
        faults += len(tally.faults)
        for line in tally.faults[:20]:
            print(f"fault: python -m dev.{Path(sys.argv[0]).stem} {line}")
        print(tally.line(name), flush=True)
    return int(faults > 0)


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of everything in a tree of JSON."""
    found: list[tuple[Any, Any]] = []
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], (dict, list)):
            found += leaves(tree[key])
    return found
