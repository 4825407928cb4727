"""Rows of a parquet file, by row groups of a bounded size: larger ones are cut once into a copy in a cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data import row_groups
from prism_fast.data.cache import Cache
from prism_fast.data.held import Held, state
from prism_fast.data.pages import SmallPages
from prism_fast.data.row_groups import PIECE_BYTES, leaves_of, opened, reason, unreadable
from prism_fast.records import DataError

GROUP_BYTES = 32 << 20  # of a row group's wanted columns; a file with a larger one is cut,
GROUP_ROWS = 20_000  # or with one of more rows, since equal texts are stored once and unpacked each for itself

EXTRA = ("question_type", "pass_rate")  # fields of extra_info that are read
Wanted = Callable[[str], bool]  # whether a field of this name is looked at


class Parquet:
    """Rows of a parquet file; row groups are unpacked when needed, and ``held`` keeps what it has room for.

    One record costs its row group. Where that is large (images by the hundred, a file of one group), ``cache`` gets a
    copy of the wanted columns in small ones, made once.
    """

    def __init__(self, path: Path, cache: Cache, wanted: Wanted | None = None, held: Held | None = None):
        self.path, self._read_from = path, path
        file = opened(path, path)
        self._theirs = _starts(file)  # before they are cut
        self.schema = file.schema_arrow
        self.columns = columns_of(self.schema, wanted or (lambda name: True), path)
        size, rows = _largest_group(file, self.columns, path)
        if size > GROUP_BYTES or rows > GROUP_ROWS:
            self._read_from = self._cut(cache, f"{path}: row groups of up to {size >> 20:,} MiB, {rows:,} rows")
            file = opened(self._read_from, path)
        self._cache = cache  # a temporary one goes with its last user
        self._held, self._state = held or Held(), state(self._read_from)
        self._start = _starts(file)
        self._unreadable: dict[int, str] = {}  # row groups, each tried once for all of its records

    def __len__(self) -> int:
        return int(self._start[-1])

    def place(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def group_of(self, index: int) -> int:
        """The row group of the file, from 1, that row ``index`` lies in."""
        return int(np.searchsorted(self._theirs, index, side="right"))

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._start, index, side="right")) - 1
        return row(self._group(group), index - int(self._start[group]), self.place(index))

    def _group(self, group: int) -> pa.Table:
        if group in self._unreadable:
            raise DataError(self._unreadable[group])
        rows = int(self._start[group + 1] - self._start[group])

        def read() -> pa.Table:
            try:
                file = self._held.file(self._read_from, self._state, lambda path: opened(path, self.path))
                table = file.read_row_group(group, columns=self.columns)
                if table.num_rows != rows:
                    raise OSError(f"{table.num_rows} of {rows} rows")
                return table
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                remedy = "copy the file again" if self._read_from == self.path else "remove it, it is made anew"
                fault = unreadable(self._read_from, group, error, remedy)
                self._unreadable[group] = str(fault)
                raise fault from error

        return self._held.group(self._read_from, group, read)

    def _cut(self, cache: Cache, groups: str) -> Path:
        """In a process of its own, which gives its memory back."""

        def make(target: Path) -> None:
            asked = json.dumps({"source": str(self.path), "target": str(target), "columns": self.columns})
            done = subprocess.run(
                [sys.executable, "-m", row_groups.__name__, asked], capture_output=True, text=True, check=False
            )
            if done.returncode == row_groups.UNREADABLE:
                raise DataError(done.stdout.strip())
            if done.returncode:
                told = done.stdout.strip() or f"exit status {done.returncode}, {done.stderr.strip()[-200:]}"
                raise DataError(
                    f"{groups} could not be cut into {target.parent} ({reason(told)}); free memory and space there, or "
                    f"choose another folder by {cache.choice}, or write the file with at most 100 rows a group "
                    "(pyarrow: row_group_size=100)"
                )

        said = f"{groups} are cut into pieces of {PIECE_BYTES >> 20} MiB, once"
        return cache.file(self.path, "rows.parquet", self.columns, make, said, self._holds_all)

    def _holds_all(self, copy: Path) -> bool:
        """Whether it is a copy of all rows, as far as its footer tells; its pages have checksums."""
        try:
            return copy.exists() and opened(copy, copy).metadata.num_rows == self._theirs[-1]
        except DataError:
            return False


def _starts(file: pq.ParquetFile) -> np.ndarray[Any, Any]:
    """The first row of each row group, then the number of rows."""
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])


def row(table: pa.Table, index: int, place: str) -> dict[str, Any]:
    """One row's values by column."""
    try:
        values = table.slice(index, 1).to_pylist()[0]
        return {name: _shortest(value, table.schema.field(name).type) for name, value in values.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: a text is not valid UTF-8; write the file again ({error})") from error
    except Exception as error:  # dates outside Python's, time zones nobody knows, ...
        detail = f"{type(error).__name__}: {reason(error)}"
        raise DataError(f"{place}: a value cannot be read; write it as a text ({detail})") from error


def _largest_group(file: pq.ParquetFile, columns: list[str], path: Path) -> tuple[int, int]:
    """(bytes of the wanted columns of the row group that has the most, unpacked or not; most rows of one)."""
    meta, size, rows = file.metadata, 0, 0
    wanted = leaves_of(meta, columns)
    with ExitStack() as stack:
        pages = cache(lambda: stack.enter_context(closing(SmallPages(path, meta))))
        for number in range(meta.num_row_groups):
            group, bytes_here = meta.row_group(number), 0
            for leaf in wanted:
                chunk = group.column(leaf)
                told = max(chunk.total_uncompressed_size, chunk.total_compressed_size)
                if _repeats(chunk):  # a text that is stored once for many rows is unpacked for each
                    with suppress(OSError, pa.ArrowException):  # said where its records are read
                        told = max(told, pages().unpacked_bytes(number, leaf))
                bytes_here += told
            size, rows = max(size, bytes_here), max(rows, group.num_rows)
    return size, rows


def _repeats(chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether a text could be stored once for so many rows that they are above GROUP_BYTES."""
    most = chunk.total_uncompressed_size * chunk.num_values
    return chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY" and most > GROUP_BYTES


def _shortest(value: Any, kind: pa.DataType) -> Any:
    """A value with its floats of 16 and 32 bits as the shortest decimal that is theirs: 0.1, not 0.10000000149."""
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return None if value is None else float(str(np.dtype(kind.to_pandas_dtype()).type(value)))
    if pa.types.is_struct(kind) and value is not None:
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return [_shortest(entry, kind.value_type) for entry in value]
    return value


def columns_of(schema: pa.Schema, wanted: Wanted, path: Path) -> list[str]:
    """The wanted columns, and images of any name; of extra_info, which may hold anything, only what is read."""
    twice = {name for name in schema.names if wanted(name) and schema.names.count(name) > 1}
    if twice:
        raise DataError(f"{path}: {min(twice)[:80]}: two columns have this name; rename one of them")
    columns = []
    for name in schema.names:
        if schema.names.count(name) > 1 or not (wanted(name) or _holds_images(schema.field(name).type)):
            continue
        kind = schema.field(name).type
        if name != "extra_info" or not pa.types.is_struct(kind):
            columns.append(name)
        else:
            columns += [f"extra_info.{read}" for read in EXTRA if kind.get_field_index(read) >= 0]
    return columns


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column has the type in which data sets hold an image, or a list of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_images(kind.value_type)
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}
