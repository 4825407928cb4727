"""Rows of a parquet file, by row groups of a bounded size: larger ones are cut once into a copy in a cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data import row_groups
from prism_fast.data.cache import Cache
from prism_fast.data.row_groups import PIECE_BYTES, opened, reason, unreadable
from prism_fast.records import DataError

GROUP_BYTES = 32 << 20  # of a row group's wanted columns; a file with a larger one is cut,
GROUP_ROWS = 20_000  # or with one of more rows, since equal texts are stored once and unpacked each for itself
HELD_BYTES = 128 << 20  # of unpacked row groups that stay in memory

EXTRA = ("question_type", "pass_rate")  # fields of extra_info that are read
Wanted = Callable[[str], bool]  # whether a field of this name is looked at


class Parquet:
    """Rows of a parquet file; row groups are unpacked when needed and kept while they fit in ``held_bytes``.

    One record costs its row group. Where that is large (images by the hundred, a file of one group), ``cache`` gets a
    copy of the wanted columns in small ones, made once.
    """

    def __init__(self, path: Path, cache: Cache, wanted: Wanted | None = None, held_bytes: int = HELD_BYTES):
        self.path = path
        self._file = opened(path, path)
        self._columns = columns_of(self._file.schema_arrow, wanted or (lambda name: True), path)
        size, rows = _largest_group(self._file, self._columns)
        if size > GROUP_BYTES or rows > GROUP_ROWS:
            self._file = opened(
                self._cut(cache, f"{path}: row groups of up to {size >> 20:,} MiB, {rows:,} rows"), path
            )
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self._start = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self._held_bytes = held_bytes

    def __len__(self) -> int:
        return int(self._start[-1])

    def place(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._start, index, side="right")) - 1
        return row(self._group(group), index - int(self._start[group]), self.place(index))

    def _group(self, group: int) -> pa.Table:
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        try:
            table = self._file.read_row_group(group, columns=self._columns)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise unreadable(self.path, group, error) from error
        self._held[group] = table
        while len(self._held) > 1 and sum(t.nbytes for t in self._held.values()) > self._held_bytes:
            self._held.popitem(last=False)
        return table

    def _cut(self, cache: Cache, groups: str) -> Path:
        """In a process of its own: a page has to be unpacked whole, and a page may be as large as its row group."""

        def make(target: Path) -> None:
            asked = json.dumps({"source": str(self.path), "target": str(target), "columns": self._columns})
            done = subprocess.run(
                [sys.executable, "-m", row_groups.__name__, asked], capture_output=True, text=True, check=False
            )
            if done.returncode == row_groups.UNREADABLE:
                raise DataError(done.stdout.strip())
            if done.returncode:
                told = done.stdout.strip() or f"exit status {done.returncode}, {done.stderr.strip()[-200:]}"
                raise DataError(
                    f"{groups} could not be cut ({reason(told)}); free memory and the disk of data.cache, or write the "
                    "file with at most 100 rows a group (pyarrow: row_group_size=100)"
                )

        said = f"{groups} are cut into pieces of {PIECE_BYTES >> 20} MiB, once"
        return cache.file(self.path, "rows.parquet", self._columns, make, said)


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


def _largest_group(file: pq.ParquetFile, columns: list[str]) -> tuple[int, int]:
    """(bytes of the wanted columns of the row group that has the most, as the file says; most rows of one)."""
    meta, size, rows = file.metadata, 0, 0
    leaves = [meta.schema.column(i).path for i in range(meta.num_columns)]
    wanted = [i for i, leaf in enumerate(leaves) if any(f"{leaf}.".startswith(f"{name}.") for name in columns)]
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        size = max(size, sum(group.column(i).total_uncompressed_size for i in wanted))
        rows = max(rows, group.num_rows)
    return size, rows


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
        raise DataError(f"{path}: {min(twice)}: two columns have this name; rename one of them")
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
