"""Row groups of a parquet file cut into small ones. As a program, which loads nothing but pyarrow:

    python -m prism_fast.data.row_groups '{"source": "a.parquet", "target": "b.parquet", "columns": ["prompt"]}'

A page is unpacked whole, and writers that count rows make pages as large as their row groups, so that it may take twice
the bytes of a row group: its process gives them back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast import DataError

PIECE_BYTES = 4 << 20  # of a row group of the copy: what it costs to look at one record
MAPPED_BYTES = 256 << 20  # of a row group; a larger one is mapped into memory, for as long as it is read
MOST_ROWS = 4096  # that are unpacked at once: a column of equal texts takes far more than a file says
UNREADABLE = 3  # exit status: the line says what is wrong with the source


def opened(path: Path, source: Path, *, mapped: bool = False) -> pq.ParquetFile:
    """For reading by and by. Pages with a checksum, as our writers', are held against it.

    A column's part of a row group is read at once, or lies in ``mapped`` memory, which counts as this process's. Never
    by a buffer: it is filled with zeros to the length that a page gives, 2 GB of a damaged one.
    """
    try:
        file = pq.ParquetFile(path, memory_map=mapped, pre_buffer=False, page_checksum_verification=True)
        _check_counts(file.metadata)
        return file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{source}: not a readable parquet file, perhaps truncated; copy it again ({reason(error)})"
        ) from error


def _check_counts(meta: pq.FileMetaData) -> None:
    """A column has at least as many values as there are rows, null or not."""
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    if sum(group.num_rows for group in groups) != meta.num_rows:
        raise OSError(f"{meta.num_rows} rows, but others in its row groups")
    for number, group in enumerate(groups):
        if group.num_rows < 0 or (group.num_columns and group.num_rows > group.column(0).num_values):
            raise OSError(f"row group {number + 1} has {group.num_rows} rows of fewer values")


def unreadable(path: Path, group: int, error: Exception, remedy: str = "copy the file again") -> DataError:
    return DataError(f"{path}: row group {group + 1} cannot be read; {remedy} ({reason(error)})")


def cut(source: Path, target: Path, columns: list[str]) -> None:
    """Copies ``columns`` into row groups of about PIECE_BYTES. Raises DataError for what cannot be read."""
    file = opened(source, source)
    writer: pq.ParquetWriter | None = None
    try:
        for batch in _batches(file, source, columns):
            if writer is None:
                writer = pq.ParquetWriter(
                    target, batch.schema, compression="lz4", use_dictionary=False, write_page_checksum=True
                )
            rows = PIECE_BYTES * batch.num_rows // max(1, batch.nbytes)
            writer.write_batch(batch, row_group_size=max(1, rows))
    finally:
        if writer is not None:
            writer.close()


def _batches(file: pq.ParquetFile, source: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for number in range(file.metadata.num_row_groups):
        group, found = file.metadata.row_group(number), 0
        rows = PIECE_BYTES * group.num_rows // max(1, group.total_byte_size)
        mapped = group.total_byte_size > MAPPED_BYTES
        try:
            with opened(source, source, mapped=True) if mapped else nullcontext(file) as read:
                for batch in read.iter_batches(
                    max(1, min(rows, MOST_ROWS)), row_groups=[number], columns=columns, use_threads=False
                ):
                    found += batch.num_rows
                    yield batch
            if found != group.num_rows:
                raise OSError(f"{found} of {group.num_rows} rows")
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise unreadable(source, number, error) from error


def reason(error: Exception | str) -> str:
    """An exception's words on one line."""
    return " ".join(str(error).split())[:200]


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    try:
        cut(Path(request["source"]), Path(request["target"]), request["columns"])
    except DataError as error:
        print(error)
        sys.exit(UNREADABLE)
    except (OSError, MemoryError, pa.ArrowException) as error:
        print(reason(error))
        sys.exit(1)
