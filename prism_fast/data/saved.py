"""Records of a data set that the library datasets saved in a folder (`save_to_disk`): Arrow streams, mapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prism_fast.data.parquet import Wanted, columns_of, row
from prism_fast.data.row_groups import reason
from prism_fast.records import DataError

STATE = "state.json"
SPLITS = "dataset_dict.json"
LONGEST_NAME = 255  # of a file
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


def is_saved(path: Path) -> bool:
    """Whether a folder is a saved data set, or several of them."""
    return (path / STATE).is_file() or (path / SPLITS).is_file()


class Saved:
    """Rows of the files that ``state.json`` lists; a row is read when it is asked for, wherever it lies."""

    def __init__(self, path: Path, wanted: Wanted | None = None):
        self.path = path / STATE  # paths of images are relative to the folder
        if not self.path.is_file():
            splits = sorted(entry.name for entry in path.iterdir() if (entry / STATE).is_file())
            raise DataError(f"{path}: holds the data sets {', '.join(splits)[:200]}; name one of them")
        try:
            state = json.loads(self.path.read_text())
            files = [_beside(path, entry["filename"]) for entry in state["_data_files"]]
            picked = state.get("_indices_data_files")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{self.path}: not a data set's state ({reason(error)}); save it again") from error
        if picked:
            raise DataError(f"{path}: is a selection of another data set; save flatten_indices() of it")
        self._tables = [_table(file) for file in files]
        for file, table in zip(files, self._tables):
            if not table.schema.equals(self._tables[0].schema):
                raise DataError(f"{file}: its columns are not those of {files[0].name}; save the data set again")
        self.schema = self._tables[0].schema if files else pa.schema([])
        self.columns = columns_of(self.schema, wanted or (lambda name: True), path)
        self._start = np.cumsum([0, *(table.num_rows for table in self._tables)])

    def __len__(self) -> int:
        return int(self._start[-1])

    def place(self, index: int) -> str:
        return f"{self.path.parent}:{index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = int(np.searchsorted(self._start, index, side="right")) - 1
        table = self._tables[file].select(sorted({name.split(".")[0] for name in self.columns}))
        return row(_sound(table.slice(index - int(self._start[file]), 1), self.place(index)), 0, self.place(index))


def _beside(folder: Path, name: str) -> Path:
    if not name or Path(name).name != name or len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a file in the folder is expected, not {name[:80]!r}")
    return folder / name


def _sound(rows: pa.Table, place: str) -> pa.Table:
    """Arrow takes offsets and lengths as they are: damaged ones would lead out of the file, and end the process."""
    try:
        rows.validate(full=True)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{place}: is damaged ({reason(error)}); save the data set again") from error
    return rows


def _table(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            table = stream.read_all()
            read, size = file.tell(), file.size()
            file.seek(max(0, size - len(END)))
            if file.read() != END:  # cut between two batches, it reads as a shorter one
                raise OSError("its end is missing")
            if read != size:
                raise OSError(f"{size - read} bytes follow its end")
            return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a readable Arrow stream, perhaps truncated ({reason(error)}); save it again"
        ) from error
