"""Raw records of a JSON list, a JSON-lines file, a parquet file or a saved data set, indexed once and read on demand.

Only offsets stay in memory; a record is parsed when it is asked for. Records are numbered from 1, as a person counts.
The offsets of a large file are kept in a cache, so that the next start does not read it through.
"""

from __future__ import annotations

import codecs
import io
import json
import mmap
import os
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prism_fast.data.cache import Cache
from prism_fast.data.held import Held, state
from prism_fast.data.parquet import Parquet, Wanted
from prism_fast.data.row_groups import reason
from prism_fast.data.saved import Saved, is_saved
from prism_fast.records import DataError

INDEXED_BYTES = 4 << 20  # of a file: smaller ones are read through at every start

_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]', re.DOTALL)


class _Json:
    """A JSON file whose records lie in spans of its bytes."""

    def __init__(self, path: Path, held: Held | None):
        self.path, self._held, self._state = path, held or Held(), state(path)
        self._span = np.empty((0, 2), np.int64)

    def __len__(self) -> int:
        return len(self._span)

    def place(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def text(self, index: int) -> bytes:
        start, end = map(int, self._span[index])
        try:
            file = self._held.file(self.path, self._state, io.FileIO)
            return os.pread(file.fileno(), end - start, start)  # no position, which forked workers would share
        except OSError as error:
            raise DataError(f"{self.place(index)}: cannot be read ({error.strerror}); copy the file again") from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _parse(self.text(index), self.place(index))


class JsonLines(_Json):
    """One JSON object per line; blank lines are allowed and not counted as records."""

    def __init__(self, path: Path, cache: Cache, held: Held | None = None):
        super().__init__(path, held)
        self._span, self._line = _index(path, cache, _lines).values()

    def place(self, index: int) -> str:
        return f"{self.path}:{self._line[index]}"


class JsonList(_Json):
    """A JSON file that holds one list of objects (LLaMA-Factory's layout), whatever its size."""

    def __init__(self, path: Path, cache: Cache, held: Held | None = None):
        super().__init__(path, held)
        (self._span,) = _index(path, cache, _elements).values()


Source = JsonLines | JsonList | Parquet | Saved
Index = dict[str, "np.ndarray[Any, Any]"]


def open_source(
    path: str | Path, wanted: Wanted | None = None, cache: Cache | None = None, held: Held | None = None
) -> Source:
    """The records of one file; the layout is told by the first bytes, not by the name.

    Of a parquet file only ``wanted`` columns are read. ``cache``: where what is made of a large file stays; ``held``:
    what keeps files open and row groups in memory, for several files. Raises DataError for a missing, empty or
    unreadable file.
    """
    source = opened_source(Path(path), wanted, cache or Cache(), held)
    if not len(source):
        raise DataError(f"{source.path}: holds no record; write at least one")
    return source


def opened_source(path: Path, wanted: Wanted | None, cache: Cache, held: Held | None) -> Source:
    """As `open_source`, of any number of records."""
    if not path.exists():
        remote = re.match(r"(https?|s3|gs|hf|file):", str(path))
        raise DataError(f"{path}: " + ("a URL; download it first" if remote else "no such file; check the path"))
    if path.is_dir() and is_saved(path):
        return Saved(path, wanted)
    if not path.is_file():
        example = "".join(f", as {found}" for found in _inside(path, "parquet", "jsonl", "json")[:1])
        raise DataError(f"{path}: not a file; name the data file itself{example}")
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
            while head and not head.strip() and (more := file.read(1 << 20)):
                head = more
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not head.strip():
        raise DataError(f"{path}: the file is empty; write at least one record")
    begins = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if head.startswith(b"PAR1") or (path.suffix == ".parquet" and begins not in (b"{", b"[")):
        source: Source = Parquet(path, cache, wanted, held)
    elif begins == b"[":
        source = JsonList(path, cache, held)
    else:
        _refuse_other_layouts(head, path)
        source = JsonLines(path, cache, held)
        _refuse_one_object(source)
    return source


def _inside(folder: Path, *suffixes: str) -> list[Path]:
    """Files with one of these suffixes in a folder and the folders in it."""
    return [found for suffix in suffixes for way in ("*", "*/*") for found in sorted(folder.glob(f"{way}.{suffix}"))]


_LAYOUTS = (  # first bytes -> what they are
    (b"\x1f\x8b", "gzip; unpack it"),
    (b"PK", "a zip archive or a spreadsheet; unpack it, or save it as JSON lines"),
    (b"\x28\xb5\x2f\xfd", "zstd; unpack it"),
    (b"ARROW1", "an Arrow file; save it as parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream; save it as parquet (datasets: to_parquet)"),
    (codecs.BOM_UTF16_LE, "UTF-16 or UTF-32; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16; save it as UTF-8"),
    (b"BZh", "bzip2; unpack it"),
    (b"\xfd7zXZ", "xz; unpack it"),
    (b"\x04\x22\x4d\x18", "lz4; unpack it"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet; save it as JSON lines"),
    (b"version https://git-lfs", "a pointer of git-lfs; run git lfs pull"),
    (b"<", "a web page or XML; download the data itself"),
)


def _refuse_other_layouts(head: bytes, path: Path) -> None:
    for start, name in _LAYOUTS:
        if head.startswith(start):
            raise DataError(f"{path}: expected JSON or parquet, this is {name}")
    if b"\0" in head[:16] or b"ustar" in head[250:270] or head.decode("utf-8", "replace").startswith("\ufffd"):
        raise DataError(
            f"{path}: expected JSON or parquet, this is a binary file or text in another encoding (UTF-16?); "
            "unpack it, or save it as JSON lines in UTF-8"
        )
    if path.suffix.lower() in (".csv", ".tsv") or not head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        shown = head.decode("utf-8", "replace").strip().splitlines()[0][:60]
        raise DataError(
            f"{path}: expected JSON objects or parquet, it begins {shown!r}; "
            "save it as JSON lines (pandas: read_csv(...).to_json(..., orient='records', lines=True))"
        )


def _refuse_one_object(source: JsonLines) -> None:
    """A JSON object over several lines is no JSON lines: one damaged line is, whose next line opens an object."""
    try:
        source[0]
    except DataError as error:
        if len(source) > 1 and not source.text(1).startswith(b"{"):
            raise DataError(
                f"{source.path}: an object over several lines; write one record a line (jq -c . FILE), or a list "
                'of the records ([{...}, ...], without {"data": ...} around it)'
            ) from error


def _index(path: Path, cache: Cache, scan: Callable[[Path], Index]) -> Index:
    """``scan(path)``, or what it once was."""
    if path.stat().st_size < INDEXED_BYTES or not cache.is_kept:
        return scan(path)

    def make() -> bytes:
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **scan(path))
        return file.getvalue()

    with np.load(io.BytesIO(cache.content(path, "offsets", scan.__name__, make)), allow_pickle=False) as found:
        return dict(found)


def _lines(path: Path) -> Index:
    """Byte spans and numbers of the lines that are not blank."""
    spans, numbers, position = array("q"), array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                spans.extend((position, position + len(line)))
                numbers.append(number)
            position += len(line)
    return {"span": np.array(spans, dtype=np.int64).reshape(-1, 2), "line": np.array(numbers, dtype=np.int64)}


def _elements(path: Path) -> Index:
    """Byte spans of the elements of a list."""
    spans = array("q")
    for span in _list_spans(_map(path), path):
        spans.extend(span)
    return {"span": np.array(spans, dtype=np.int64).reshape(-1, 2)}


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Twice(Exception):
    """A key that an object holds twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(data: bytes, place: str) -> dict[str, Any]:
    try:
        record = _DECODER.decode(data.decode("utf-8-sig"))
        if b"\\u" in data:
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: a text holds half of a character (\\ud800 to \\udfff); write it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not valid UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except _Twice as error:
        raise DataError(
            f"{place}: {str(error)[:80]}: the field stands twice in one object; keep one of them"
        ) from error
    except (ValueError, RecursionError) as error:
        remedy = "write one record a line" if str(error).startswith("Extra data") else "correct or remove the record"
        raise DataError(f"{place}: the JSON does not parse ({reason(error)}); {remedy}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected a JSON object with named fields, got {type(record).__name__}; correct it")
    return record


def _list_spans(data: mmap.mmap, path: Path) -> Iterator[tuple[int, int]]:
    """Byte spans of the elements of a top-level JSON list, by one scan over its brackets and strings."""
    depth = start = end = count = 0
    for match in _STRUCTURE.finditer(data):
        bracket = match.group()
        if bracket in (b"[", b"{"):
            depth += 1
            if depth == 1:
                end = match.end()
            elif depth == 2:
                start = match.start()
                if data[end:start].strip() != (b"," if count else b""):
                    raise DataError(f"{path}:{count + 1}: expected objects between commas; correct the JSON list")
        elif bracket in (b"]", b"}"):
            depth -= 1
            if depth == 1:
                yield start, (end := match.end())
                count += 1
            elif depth == 0:
                if data[end : match.start()].strip() or data[match.end() :].strip():
                    raise DataError(f"{path}:{count + 1}: unexpected text around the list's end; correct the JSON list")
                return
    raise DataError(f"{path}:{count + 1}: the JSON list is not closed, perhaps truncated; write the file again")
