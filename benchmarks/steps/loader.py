"""Records to encoded batches by worker processes: ours beside torch's DataLoader and `datasets` streaming.

Every way reads the same demonstrations and runs the trainer's own transform on them: decode, cut into patches, render,
tokenise. "digits": the demo's, small scenes as PNG; "photos": JPEGs of a million pixels in parquet, whose patches are
24 MB a record. Workers have one thread each. An epoch is timed from before the workers start; "cached" is the epoch
after it, with the same workers, whose processed images are still there. DataLoader collates a list; `datasets` gives
another order, from as many parquet files as workers, through a buffer of 256. "training" is updates of the tiny model
on the same batches, on one thread and on as many as there are workers; "over training" is within a round, over the
faster of the two. CPU seconds are those of all processes, for a machine that others use: "by CPU seconds" is what a
core encodes over what one that trains alone gets through. Before that each way's records are compared with those that
one process encodes, in their order.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.harness import measure
from benchmarks.harness.document import add_times
from benchmarks.harness.measure import Unavailable
from benchmarks.harness.peers import need
from benchmarks.harness.run import Options
from benchmarks.steps.loader_case import DEFAULT, LOADS, SEED, Case, Encode, Load, Record
from prism_fast.config import ModelConfig, OptimizerConfig
from prism_fast.data.batches import Batches
from prism_fast.data.dataset import Dataset
from prism_fast.data.fields import Fields
from prism_fast.data.formats import FORMATS
from prism_fast.models.load import load_policy
from prism_fast.steps.sft_step import demonstration_packs, supervised_gradient
from prism_fast.steps.update import open_updater

ABOUT = __doc__  # of this file: in a class the name is its own

OURS = "ours"
TRAINING = "training"
TICKS = os.sysconf("SC_CLK_TCK")
Keep = Callable[[dict[str, Any]], None]


class Way:
    """``epoch()`` yields batches; ``pids``: of its workers, while it is open."""

    def __init__(self, case: Case):
        self.case = case
        self.pids: list[int] = []

    def epoch(self) -> Iterator[Sequence[Record]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Ours(Way):
    def __init__(self, case: Case, workers: int):
        super().__init__(case)
        self.batches: Batches[Record] = Batches(case.data, len(case.data), case.fresh(), SEED, workers)
        self.pids = [worker.pid for worker in self.batches._workers]
        self.start = 0

    def epoch(self) -> Iterator[Sequence[Record]]:
        for number in map(len, self.case.picked()):
            yield self.batches.take(self.start, number)
            self.start += number

    def close(self) -> None:
        self.batches.close()


class _Mapped(torch.utils.data.Dataset[Record]):
    def __init__(self, data: Dataset, encode: Encode):
        self.data, self.encode = data, encode

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        return self.encode(self.data[index])


class Torch(Way):
    def __init__(self, case: Case):
        super().__init__(case)
        mapped = _Mapped(case.data, case.fresh())
        workers = {"num_workers": case.load.workers, "persistent_workers": True, "worker_init_fn": _one_thread}
        self.loader = DataLoader(mapped, batch_sampler=case.picked(), collate_fn=list, **workers)

    def epoch(self) -> Iterator[Sequence[Record]]:
        batches = iter(self.loader)
        self.pids = [worker.pid for worker in batches._workers]
        yield from batches

    def close(self) -> None:
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()


class _Streamed(IterableDataset[Record]):
    def __init__(self, rows: Any, encode: Encode):
        self.rows, self.encode = rows, encode

    def __iter__(self) -> Iterator[Record]:
        for row in self.rows:
            yield self.encode(FORMATS["sft"](Fields(row, "row", Path(), None)))


class Streaming(Way):
    def __init__(self, case: Case):
        super().__init__(case)
        datasets = need("datasets", "datasets")
        datasets.disable_progress_bars()
        files = {"train": list(map(str, case.parquet))}
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)
        streamed = _Streamed(rows.shuffle(seed=SEED, buffer_size=256), case.fresh())
        workers = {"num_workers": case.load.workers, "worker_init_fn": _one_thread}
        self.loader = DataLoader(streamed, batch_size=case.load.batch, collate_fn=list, **workers)

    def epoch(self) -> Iterator[Sequence[Record]]:
        batches = iter(self.loader)
        self.pids = [worker.pid for worker in batches._workers]
        yield from batches


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


WAYS: dict[str, Callable[[Case], Way]] = {
    OURS: lambda case: Ours(case, case.load.workers),
    "torch DataLoader": Torch,
    "datasets streaming, DataLoader": Streaming,
    "ours, no worker": lambda case: Ours(case, 0),
}
CACHED = (OURS, "torch DataLoader", "ours, no worker")  # which have a second epoch too


def marks(batch: Sequence[Record]) -> list[tuple[Any, ...]]:
    """What tells records apart, read off all that a batch holds."""
    found = []
    for prompt, response in batch:
        pixels = torch.zeros(0) if prompt.pixel_values is None else prompt.pixel_values
        weights = torch.arange(1, pixels.numel() + 1, dtype=torch.float64)
        mark = float(pixels.double().flatten() @ weights)
        found.append((prompt.key, mark, tuple(prompt.input_ids.tolist()), tuple(response.tolist())))
    return found


def tokens_of(batch: Sequence[Record]) -> int:
    return sum(len(prompt) + len(response) for prompt, response in batch)


def cpu_seconds(pids: Sequence[int]) -> float:
    """Of this process, of children that have ended, and of these, so far."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def timed(name: str, case: Case) -> dict[str, dict[str, float]]:
    """{row: {"seconds", "cpu", "tokens"}} of an epoch, and of the cached one."""
    found = {}
    start, cpu = time.perf_counter(), cpu_seconds([])
    way = WAYS[name](case)
    try:
        for row in (name, f"{name}, cached") if case.load.cached and name in CACHED else (name,):
            tokens = 0
            for batch in way.epoch():
                tokens += tokens_of(batch)
            now, spent = time.perf_counter(), cpu_seconds(way.pids)
            found[row] = {"seconds": now - start, "cpu": spent - cpu, "tokens": tokens}
            start, cpu = now, spent
    finally:
        way.close()
    return found


def check(name: str, case: Case, truth: list[Any]) -> str:
    """What is wrong with a way's records, or ""."""
    way = WAYS[name](case)
    try:
        found = [mark for batch in way.epoch() for mark in marks(batch)]
    finally:
        way.close()
    if sorted(found) != sorted(truth):
        return f"{len(found)} records, of which {len(set(found) & set(truth))} are among the {len(truth)} expected"
    return "" if isinstance(way, Streaming) or found == truth else "the records come in another order"


class Training:
    """Updates of the tiny model on batches that are there."""

    def __init__(self, case: Case):
        self.policy = load_policy(ModelConfig(path=str(case.base)), case.chat)
        self.updater = open_updater(self.policy, OptimizerConfig(lr=1e-4), 1000)
        encode = case.fresh()
        self.batches = [[encode(case.data[i]) for i in picked] for picked in case.picked()[:8]]
        self.number = 0
        self.timed(updates=2)  # what is allocated once

    def timed(self, threads: int = 1, updates: int = 4) -> dict[str, float]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        start, cpu, tokens = time.perf_counter(), time.process_time(), 0
        for _ in range(updates):
            batch = self.batches[self.number % len(self.batches)]
            self.number, tokens = self.number + 1, tokens + tokens_of(batch)
            supervised_gradient(self.updater, demonstration_packs(batch, 4096, self.policy))
            self.updater.step()
        torch.set_num_threads(before)
        return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "tokens": tokens}


def training_rows(load: Load) -> dict[str, int]:
    """Threads of each row of training; the first's are those of "by CPU seconds"."""
    return {f"{TRAINING}, {n} thread{'s' * (n > 1)}": n for n in sorted({1, load.workers})}


class Loader:
    """A benchmark as `harness.run` runs them."""

    op = "loader"
    description = ABOUT
    seconds = 60.0  # of one problem; at least 3 rounds

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--shape", action="append", choices=sorted(LOADS), help="repeatable; default: all but tiny")
        parser.add_argument("--peers", help="parts of names, comma-separated; '' for none (default: all)")

    def options(self, given: argparse.Namespace) -> dict[str, Any]:
        names = given.shape or (("tiny",) if given.dry_run else DEFAULT)
        peers = None if given.peers is None else [part for part in given.peers.split(",") if part]
        return {"shapes": tuple(names), "peers": peers}

    def dtypes(self, options: Options) -> dict[str, torch.dtype]:
        return {}

    def results(self, options: Options, keep: Keep) -> Iterator[dict[str, Any]]:
        for name in options.shapes:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                yield result(name, Case.made(LOADS[name], folder), options, keep)


def result(name: str, case: Case, options: Options, keep: Keep) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "loader", "title": f"records to batches, {name}", "status": "ok", "flops": 0.0, "bytes": 0.0,
        "shape": {"load": name, **vars(case.load)}, "sizes": ["records", "batch", "workers"], "rows": [],
    }  # fmt: skip
    rows = {way: _new(way) for way in WAYS if _wanted(way, options.peers)}
    truth = [mark for picked in case.picked() for mark in marks([case.fresh()(case.data[i]) for i in picked])]
    measure.say(f"{name}: {len(rows)} ways, each against one process first")
    for way, row in rows.items():
        try:
            wrong = check(way, case, truth)
        except (Unavailable, Exception) as error:  # noqa: BLE001 - a peer may raise anything; its row says what
            wrong, row["status"] = measure.short(error), "failed"
        if wrong:
            row.update(status="failed" if row["status"] == "failed" else "wrong", reason=wrong)
    found["rows"] = list(rows.values())
    bad = [row for row in rows.values() if row["role"] == "ours" and row["status"] != "ok"]
    if bad:
        return {**found, "status": "refused", "reason": "; ".join(f"{row['name']}: {row['reason']}" for row in bad)}
    training = Training(case) if case.load.trains else None
    began = time.perf_counter()
    taken: dict[str, list[dict[str, float]]] = {}
    least = 1 if options.small else 3
    while (done := len(taken.get(OURS, ()))) < (options.rounds or least) or (
        options.rounds is None and not options.small and time.perf_counter() - began < options.seconds
    ):
        ways = [way for way, row in rows.items() if row["status"] == "ok"]
        for way in ways if done % 2 == 0 else reversed(ways):
            for row_name, value in timed(way, case).items():
                taken.setdefault(row_name, []).append(value)
        for row_name, threads in training_rows(case.load).items() if training is not None else ():
            taken.setdefault(row_name, []).append(training.timed(threads))
        fill(found, rows, taken)
        keep(found)
    return found


def fill(found: dict[str, Any], rows: dict[str, dict[str, Any]], taken: dict[str, list[dict[str, float]]]) -> None:
    """Times, speeds and ratios of what was taken by now."""
    made: list[dict[str, Any]] = []
    trained = [taken[name] for name in taken if name.startswith(TRAINING)]
    fastest = [max(map(_speed, ones)) for ones in zip(*trained)]
    for name in [*(n for way in WAYS for n in (way, f"{way}, cached")), *(n for n in taken if n.startswith(TRAINING))]:
        if name in rows and rows[name]["status"] != "ok":
            made.append(rows[name])
        if name not in taken:
            continue
        row = rows.get(name) or _new(name)
        rounds = taken[name]
        add_times(row, [one["seconds"] for one in rounds])
        row["tokens_per_s"] = statistics.median(map(_speed, rounds))
        row["tokens_per_cpu_s"] = _of_core(rounds)
        ours = taken.get(f"{OURS}, cached" if name.endswith("cached") else OURS, [])
        if name != OURS and not name.startswith(TRAINING) and len(ours) == len(rounds):
            row["times_ours"] = statistics.median(_speed(mine) / _speed(one) for mine, one in zip(ours, rounds))
        if trained and not name.startswith(TRAINING):
            row["over_training"] = statistics.median(_speed(one) / best for one, best in zip(rounds, fastest))
            row["over_training_cpu"] = row["tokens_per_cpu_s"] / _of_core(trained[0])
        made.append(row)
    found["rows"] = made


def _speed(one: dict[str, float]) -> float:
    return one["tokens"] / one["seconds"]


def _of_core(rounds: list[dict[str, float]]) -> float:
    return statistics.median(one["tokens"] / max(one["cpu"], 1e-9) for one in rounds)


def _new(name: str) -> dict[str, Any]:
    return {"name": name, "role": "ours" if name.startswith((OURS, TRAINING)) else "peer", "status": "ok"}


def _wanted(way: str, peers: Sequence[str] | None) -> bool:
    return way.startswith(OURS) or peers is None or any(part.lower() in way.lower() for part in peers)


BENCH = Loader()
