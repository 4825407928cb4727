"""Row groups of a parquet file cut into small ones. As a program, which loads nothing but pyarrow:

    python -m prism_fast.data.row_groups '{"source": "a.parquet", "target": "b.parquet", "columns": ["prompt"]}'

In bounded memory, see `prism_fast.data.pages`; its process gives back what pyarrow's allocator would keep.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast import DataError
from prism_fast.data.pages import SmallPages

PIECE_BYTES = 4 << 20  # of a row group of the copy: what it costs to look at one record
MOST_ROWS = 4096  # that are unpacked at once: a column of equal texts takes far more than a file says
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNREADABLE = 3  # exit status: the line says what is wrong with the source


def opened(path: Path, source: Path) -> pq.ParquetFile:
    """For reading by and by. Pages with a checksum, as our writers', are held against it.

    A column's part of a row group is read at once. Never by a buffer: it is filled with zeros to the length that a page
    gives, 2 GB of a damaged one.
    """
    try:
        file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
        _check_counts(file.metadata)
        return file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _no_file(source, error) from error


def _no_file(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable parquet file, perhaps truncated; copy it again ({reason(error)})")


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
    writer: pq.ParquetWriter | None = None
    try:
        for table in _pieces(_batches(source, target.parent, columns)):
            if writer is None:
                writer = pq.ParquetWriter(
                    target, table.schema, compression="lz4", use_dictionary=False, write_page_checksum=True
                )
            writer.write_table(table, row_group_size=max(1, PIECE_BYTES * table.num_rows // max(1, table.nbytes)))
    finally:
        if writer is not None:
            writer.close()


def _pieces(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        if held and size + batch.nbytes > PIECE_BYTES:
            yield pa.Table.from_batches(held)
            held, size = [], 0
        held.append(batch)
        size += batch.nbytes
    if held:
        yield pa.Table.from_batches(held)


def _batches(source: Path, scratch: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    meta = opened(source, source).metadata
    leaves = leaves_of(meta, columns)
    try:
        opened_small = SmallPages(source, meta, scratch)
    except OSError as error:
        raise _no_file(source, error) from error
    with closing(opened_small) as small:
        for number in range(meta.num_row_groups):
            found, wanted = 0, meta.row_group(number).num_rows
            try:
                with small.group(number, leaves, PIECE_BYTES // 4) as (file, rows):
                    for batch in file.iter_batches(
                        max(1, min(int(rows), MOST_ROWS)), columns=columns, use_threads=False
                    ):
                        found += batch.num_rows
                        yield batch
                if found != wanted:
                    raise OSError(f"{found} of {wanted} rows")
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                if isinstance(error, OSError) and error.errno in FULL:  # of scratch
                    raise
                raise unreadable(source, number, error) from error


def leaves_of(meta: pq.FileMetaData, columns: list[str]) -> list[int]:
    """Numbers of the columns as they are stored that are part of ``columns``."""
    paths = [meta.schema.column(number).path for number in range(meta.num_columns)]
    return [n for n, path in enumerate(paths) if any(f"{path}.".startswith(f"{name}.") for name in columns)]


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
