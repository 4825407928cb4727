"""What reading a parquet file far larger than memory takes: the peak of a process that opens, judges and draws records.

    python -m dev.parquet_memory [--records 2000] [--image-bytes 1000000] [--drawn 300] [--folder /tmp] [--only zstd]

Writes RLVR files with an image to each record (2 GB each, one after the other, into a temporary folder), as groups of
100 rows and as one row group, that one as writers make it by default and as they can be told to; those that are not
installed are passed over. Each is read in a process of its own: VmHWM (ru_maxrss would be the parent's) after the
imports, and after all records are judged and random ones drawn. One that is cut is cut in another process, whose peak
over its imports counts as the reader's does: exit status 1 where either takes more than LIMIT.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Writer = Callable[[Path, Iterator[dict[str, Any]]], None]

LIMIT = 400  # MB over the interpreter with its imports

_PEAK = """
import json, os, runpy, sys

def peak():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""

_CUTTER = (
    _PEAK
    + """
import prism_fast.data.pages
before = peak()
sys.argv[0] = "prism_fast.data.row_groups"
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    with open(os.environ["CUTTER_PEAK"], "w") as file:
        file.write(str(peak() - before))
"""
)

_READER = (
    _PEAK
    + """
import random
from pathlib import Path
from prism_fast.data import parquet
from prism_fast.data.formats import read_rlvr

path, cache, drawn = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
os.environ["CUTTER_PEAK"] = str(path) + ".peak"
run = parquet.subprocess.run
parquet.subprocess.run = lambda command, **options: run([sys.executable, "-c", sys.argv[4], command[-1]], **options)
before = peak()
data = read_rlvr(path, cache=cache)
judged, rng = peak(), random.Random(0)
bytes_read = sum(len(data[rng.randrange(len(data))].images[0].data) for _ in range(drawn))
print(json.dumps([len(data), before, judged, peak(), bytes_read]))
"""
)


def rows(count: int, image_bytes: int) -> Iterator[dict[str, object]]:
    rng = random.Random(0)
    for number in range(count):
        yield {
            "prompt": [{"role": "user", "content": f"<image>How many, {number}?"}],
            "images": [{"bytes": rng.randbytes(image_bytes), "path": None}],
            "reward_model": {"style": "rule", "ground_truth": str(number)},
        }


def _table(records: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(records)


def _groups(size: int) -> Writer:
    """Without compression and dictionaries, in memory of a group at most."""

    def write(path: Path, records: Iterator[dict[str, Any]]) -> None:
        schema = _table(list(rows(1, 1))).schema
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            while held := list(islice(records, size)):
                writer.write_table(pa.Table.from_pylist(held, schema), row_group_size=size)

    return write


def _pyarrow(**options: Any) -> Writer:
    def write(path: Path, records: Iterator[dict[str, Any]]) -> None:
        pq.write_table(_table(list(records)), path, **options)

    return write


def _pandas(path: Path, records: Iterator[dict[str, Any]]) -> None:
    importlib.import_module("pandas").DataFrame(list(records)).to_parquet(path)


def _datasets(path: Path, records: Iterator[dict[str, Any]]) -> None:
    importlib.import_module("datasets").Dataset.from_list(list(records)).to_parquet(path, batch_size=1 << 20)


def _polars(path: Path, records: Iterator[dict[str, Any]]) -> None:
    importlib.import_module("polars").DataFrame(list(records)).write_parquet(path)


def _duckdb(path: Path, records: Iterator[dict[str, Any]]) -> None:
    connection = importlib.import_module("duckdb").connect()
    connection.register("made", _table(list(records)))
    connection.execute(f"copy (select * from made) to '{path}' (format parquet)")


_ALL = {"write_batch_size": 1 << 20, "data_page_size": 1 << 30, "use_dictionary": False}  # one page of everything
WRITERS: dict[str, Writer] = {
    "groups of 100 rows": _groups(100),
    "plain": _groups(1 << 20),
    "pyarrow": _pyarrow(),
    "zstd": _pyarrow(compression="zstd"),
    "page v2": _pyarrow(data_page_version="2.0"),
    "one page": _pyarrow(**_ALL),
    "pandas": _pandas,
    "datasets": _datasets,
    "polars": _polars,
    "duckdb": _duckdb,
}


NEXT_START = ("groups of 100 rows", "plain")  # the others' copies are alike


def write(path: Path, how: str, count: int, image_bytes: int) -> bool:
    """In a process of its own; whether the library is there."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            WRITERS[how](path, rows(count, image_bytes))
            status = 0
        except ImportError:
            status = 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, 2):
        raise SystemExit(f"{path}: could not be written")
    return status == 0


def measure(path: Path, cache: Path, drawn: int) -> tuple[list[int], int | None]:
    """(what the reader tells, MB that the process that cuts takes over its imports)."""
    told = path.with_name(f"{path.name}.peak")
    told.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(path), str(cache), str(drawn), _CUTTER],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), int(told.read_text()) if told.exists() else None


def measured(path: Path, how: str, asked: argparse.Namespace) -> int:
    """The most that a process takes, in MB over its imports."""
    most, size, groups = 0, path.stat().st_size, pq.read_metadata(path).num_row_groups
    for start in ("first start", "next start") if how in NEXT_START else ("first start",):
        (count, before, judged, peak, read), cutting = measure(path, path.parent / "cache", asked.drawn)
        most = max(most, peak - before, cutting or 0)
        print(
            f"{how}: {size / 1e9:.2f} GB, row groups: {groups}, {start}: {count:,} records judged and {asked.drawn} "
            f"drawn ({read / 1e6:,.0f} MB of images): {peak - before} MB over the imports ({before} -> {judged} -> "
            f"{peak} MB)" + (f"; the process that cuts: {cutting} MB over its own" if cutting is not None else ""),
            flush=True,
        )
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--image-bytes", type=int, default=1_000_000)
    parser.add_argument("--drawn", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", nargs="+", choices=WRITERS, default=list(WRITERS))
    asked, most = parser.parse_args(), 0
    for how in asked.only:
        with tempfile.TemporaryDirectory(dir=asked.folder, prefix="parquet-memory-") as folder:
            path = Path(folder) / "data.parquet"
            if write(path, how, asked.records, asked.image_bytes):
                most = max(most, measured(path, how, asked))
            else:
                print(f"{how}: is not installed")
    print(f"most: {most} MB over the imports, of at most {LIMIT}")
    return int(most > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
