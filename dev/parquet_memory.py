"""What reading a parquet file far larger than memory takes: the peak of a process that opens, judges and draws records.

    python -m dev.parquet_memory [--records 2000] [--image-bytes 1000000] [--drawn 300] [--folder /tmp]

Writes RLVR files with an image to each record, as one row group and as groups of 100 rows, into a temporary folder
(2 GB each, one after the other), and reads each in a process of its own: VmHWM (ru_maxrss would be the parent's) after
the imports, and after all records are judged and random ones drawn. One that is cut is cut in another
process, whose peak is told too. Exit status 1 where a reader takes more than LIMIT.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LIMIT = 400  # MB over the interpreter with its imports

_READER = """
import json, random, resource, sys
from pathlib import Path
from prism_fast.data.formats import read_rlvr

def peak():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

path, cache, drawn = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
before = peak()
data = read_rlvr(path, cache=cache)
judged, rng = peak(), random.Random(0)
bytes_read = sum(len(data[rng.randrange(len(data))].images[0].data) for _ in range(drawn))
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
print(json.dumps([len(data), before, judged, peak(), bytes_read, children]))
"""


def rows(count: int, image_bytes: int) -> Iterator[dict[str, object]]:
    rng = random.Random(0)
    for number in range(count):
        yield {
            "prompt": [{"role": "user", "content": f"<image>How many, {number}?"}],
            "images": [{"bytes": rng.randbytes(image_bytes), "path": None}],
            "reward_model": {"style": "rule", "ground_truth": str(number)},
        }


def write(path: Path, count: int, image_bytes: int, group: int) -> None:
    """In memory of a group at most, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        schema = pa.Table.from_pylist(list(rows(1, 1))).schema
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            held: list[dict[str, object]] = []
            for number, record in enumerate(rows(count, image_bytes), 1):
                held.append(record)
                if len(held) == group or number == count:
                    writer.write_table(pa.Table.from_pylist(held, schema), row_group_size=group)
                    held.clear()
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{path}: could not be written")


def measure(path: Path, cache: Path, drawn: int) -> tuple[list[int], str]:
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(path), str(cache), str(drawn)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), done.stderr.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--image-bytes", type=int, default=1_000_000)
    parser.add_argument("--drawn", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    asked, most = parser.parse_args(), 0
    for group in (asked.records, 100):
        with tempfile.TemporaryDirectory(dir=asked.folder, prefix="parquet-memory-") as folder:
            path = Path(folder) / "data.parquet"
            write(path, asked.records, asked.image_bytes, group)
            size, groups = path.stat().st_size, pq.read_metadata(path).num_row_groups
            for start in ("first start", "next start"):
                (count, before, judged, peak, read, cutting), said = measure(path, Path(folder) / "cache", asked.drawn)
                most = max(most, peak - before)
                print(
                    f"{size / 1e9:.2f} GB, row groups: {groups}, {start}: {count:,} records judged and {asked.drawn} "
                    f"drawn ({read / 1e6:,.0f} MB of images): {peak - before} MB over the imports ({before} -> {judged}"
                    f" -> {peak} MB)" + (f"; the process that cuts: {cutting} MB" if said else ""),
                    flush=True,
                )
    print(f"most: {most} MB over the imports, of at most {LIMIT}")
    return int(most > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
