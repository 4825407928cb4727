"""A row group of a parquet file with pages of a bounded size, whatever they are in the file.

pyarrow unpacks a page whole, and a dictionary too; writers that count values (pyarrow and pandas: 1,024) make pages of
1 GB of images of 1 MB. Here columns of byte strings that have such pages are read value by value, in pieces, and
handed to pyarrow as plain pages of about PAGE_BYTES; what columns there are and how their lists lie is left to it.

Left as it is, and so unpacked whole: a page of a codec or an encoding that `unpack` and `values` do not have, and
pages of numbers. A value is held whole, and so is a record.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data.thrift import I32, I64, LIST, STRUCT, Fault, Struct, read_struct, write_struct
from prism_fast.data.unpack import CODECS, PIECE, PLAIN, Stream, unpacked, unpacked_at_once
from prism_fast.data.values import (
    DICTIONARIES,
    ENCODINGS,
    RLE,
    Dictionary,
    level_count,
    levels,
    named_runs,
    numbers_part,
    packed_levels,
    values_of,
)

LARGEST_PAGE = 8 << 20  # packed or not; what pyarrow unpacks
PAGE_BYTES = 1 << 20  # of a page that is made of a larger one, unless one value is more
PAGE_VALUES = 20_000
MOST_VALUES = 1 << 24  # of a column of lists in a row group, nulls too,
MOST_OF_A_ROW = 1024  # or so many in the mean

DATA, INDEX, DICTIONARY, DATA_2 = range(4)  # kinds of pages
BYTE_ARRAY = 6  # a physical type
LONGEST_HEADER = 16 << 20  # as pyarrow has it
_APART = 1 << 41  # between the columns of the file that pyarrow is shown


class Page(NamedTuple):
    kind: int
    begin: int  # of its body in the file
    packed: int  # bytes
    unpacked: int  # bytes
    checksum: int | None
    values: int  # of a data page, nulls too; of a dictionary
    encoding: int
    levels: tuple[int, int, bool] | None = None  # of the second version: bytes of both, whether values are packed
    stored: tuple[int, int] = (RLE, RLE)  # encodings of both levels, of the first version


class Column:
    """One column's part of a row group."""

    def __init__(self, fd: int, told: Struct, about: pq.ColumnSchema, rows: int):
        meta: Struct = told[3][1]
        self.meta, self.fd, self.name = meta, fd, about.path
        self._highest = (about.max_repetition_level, about.max_definition_level)
        self.codec, self.values, self.size = meta[4][1], meta[5][1], meta[7][1]
        self.begin = min(meta[field][1] for field in (9, 11) if field in meta and (meta[field][1] > 0 or field == 9))
        self.is_text = meta[1][1] == BYTE_ARRAY
        self.is_plain = not {1, 8, 9} & told.keys()  # lies in this file, and not encrypted
        most = max(MOST_VALUES, MOST_OF_A_ROW * rows) if self._highest[0] else rows
        if self.values > most:  # a run of any length takes a few bytes of a page, and a step each here
            raise Fault(f"{self.name}: {self.values} values in {rows} rows")
        self.pages = list(self._walk()) if self.is_plain else []

    def _walk(self) -> Iterator[Page]:
        at, seen = self.begin, 0
        end = min(self.begin + self.size + 100, os.fstat(self.fd).st_size)  # old writers left out a header's bytes
        while seen < self.values and at < self.begin + self.size:
            header, at = self._header(at, end)
            page = _page(header, at)
            at += page.packed
            raw = sum(page.levels[:2]) if page.levels else 0
            if min(page.packed, page.unpacked) < max(0, raw) or page.values < 0 or at > end:
                raise Fault(
                    f"{self.name}: a page of {page.packed} bytes, of them {raw} of levels; {end - page.begin} are left"
                )
            if page.kind in (DATA, DATA_2):
                seen += page.values
                if seen > self.values:
                    raise Fault(f"{self.name}: pages of {seen} values, where the footer says {self.values}")
            if page.kind in (DATA, DATA_2, DICTIONARY):
                yield page

    def _header(self, at: int, end: int) -> tuple[Struct, int]:
        size = 1 << 12
        if at >= end:
            raise Fault(f"{self.name}: pages are missing")
        while True:
            data = os.pread(self.fd, min(size, end - at), at)
            try:
                header, length = read_struct(data)
                return header, at + length
            except IndexError:
                if len(data) < size or size > LONGEST_HEADER:
                    raise Fault(f"{self.name}: a page's header does not end") from None
                size *= 8

    def is_remade(self) -> bool:
        """Whether it has a page that is too large, and all of its pages can be read here."""
        return self._is_readable() and any(max(page.packed, page.unpacked) > LARGEST_PAGE for page in self.pages)

    def _is_readable(self) -> bool:
        readable = self.is_text and self.codec in CODECS and max(self._highest) < 128
        return readable and all(
            page.encoding in ENCODINGS and all(how == RLE for how, most in zip(page.stored, self._highest) if most)
            for page in self.pages
        )

    def stream(self, page: Page) -> Stream:
        """The values of a page, and its levels where they are packed with them; checked as it is read."""
        raw, is_packed = (page.levels[0] + page.levels[1], page.levels[2]) if page.levels else (0, True)
        size, packed = page.unpacked - raw, self._read(page, raw)
        codec = self.codec if is_packed else PLAIN
        if max(page.packed, page.unpacked) <= LARGEST_PAGE:
            packed = iter((unpacked_at_once(b"".join(packed), codec, size),))
        else:
            packed = unpacked(packed, codec, size)
        return Stream(packed, size)

    def _read(self, page: Page, begin: int = 0) -> Iterator[bytes]:
        """A page's bytes in pieces from ``begin`` on, against its checksum, which counts those before too."""
        found = 0
        for at in range(0, page.packed, PIECE):
            piece = os.pread(self.fd, min(PIECE, page.packed - at), page.begin + at)
            if page.checksum is not None:
                found = zlib.crc32(piece, found)
            if at + len(piece) > begin:
                yield piece[max(0, begin - at) :]
        if page.checksum is not None and found != page.checksum:
            raise Fault(f"{self.name}: a page's bytes are not those of its checksum")

    def small_pages(self, dictionary: Dictionary | None) -> Iterator[bytes]:
        for page in self.pages:
            if page.kind != DICTIONARY:
                try:
                    yield from self._split(page, dictionary)
                except IndexError:
                    raise Fault(f"{self.name}: a page ends before its values do") from None

    def _split(self, page: Page, dictionary: Dictionary | None) -> Iterator[bytes]:
        stream = self.stream(page)
        repeated, defined = self._levels(page, stream)
        values = values_of(stream, page.encoding, page.values, dictionary)
        made = _Made(self._highest)
        for repeat, define in zip(repeated, defined):
            value = None
            if define == self._highest[1]:
                value = next(values, None)
                if value is None:
                    raise Fault(f"{self.name}: a page has fewer values than its levels say")
            if made.is_full(value):
                yield made.page()
                made = _Made(self._highest)
            made.add(repeat, define, value)
        if made.repeated:
            yield made.page()
        stream.finish()

    def _levels(self, page: Page, stream: Stream) -> tuple[Iterator[int], Iterator[int]]:
        both = zip(self._stored_levels(page, stream), self._highest)
        repeated, defined = (levels(data, most, page.values) for data, most in both)
        return repeated, defined

    def _stored_levels(self, page: Page, stream: Stream) -> list[bytes]:
        if not page.levels:
            return [
                numbers_part(stream, int.from_bytes(stream.take(4), "little")) if most else b""
                for most in self._highest
            ]
        stored, at = [], page.begin
        for size in page.levels[:2]:
            stored.append(os.pread(self.fd, size, at))
            at += size
        return stored

    def dictionary_values(self) -> Iterator[bytes]:
        for page in self.pages:
            if page.kind == DICTIONARY:
                stream = self.stream(page)
                yield from values_of(stream, PLAIN, page.values)
                stream.finish()
                return

    def longest_of_dictionary(self) -> int:
        """Bytes of the longest value that is stored once for all of its rows, 0 without such."""
        sizes = [page.unpacked for page in self.pages if page.kind == DICTIONARY]
        if not self.is_text or not sizes:
            return 0
        if self.codec not in CODECS:
            return sizes[0]
        return max(map(len, self.dictionary_values()), default=0)

    def unpacked_bytes(self) -> int:
        """Of all its values, those of a dictionary as often as they are named, as far as that can be read here."""
        if not self._is_readable():
            return 0
        lengths, size = array("q", map(len, self.dictionary_values())), 0
        for page in self.pages:
            if page.kind != DICTIONARY and page.encoding in DICTIONARIES:
                stream = self.stream(page)
                count = level_count(self._stored_levels(page, stream)[1], self._highest[1], page.values)
                for found, times in named_runs(stream, count):
                    size += times * sum(lengths[number] for number in found)
            elif page.kind != DICTIONARY:
                size += page.unpacked
        return size

    def rows_of(self, share: int, rows: int, longest: int) -> float:
        """How many of ``rows`` rows have ``share`` bytes: by pages' means, or all a dictionary's ``longest`` value."""
        most = float(rows)
        for page in self.pages:
            if page.kind != DICTIONARY and page.values:
                size = max(page.unpacked, page.values * longest if page.encoding in DICTIONARIES else 0)
                most = min(most, share * page.values * rows / self.values / size) if size else most
        return most

    def told(self, place: int, *, is_remade: bool) -> Struct:
        """What a footer tells of it where it lies at ``place``."""
        meta = {field: value for field, value in self.meta.items() if field not in (11, 12, 13, 14, 15)}
        if is_remade:
            most = (I64, _APART // 2)  # nobody knows yet; pyarrow stops after the last value
            meta |= {2: (LIST, (I32, [PLAIN, RLE])), 4: (I32, PLAIN), 6: most, 7: most, 9: (I64, place)}
        else:
            begins = {field: self.meta[field][1] for field in (9, 11) if field in self.meta}
            meta |= {field: (I64, place + at - self.begin) for field, at in begins.items() if at > 0}
        return {2: (I64, 0), 3: (STRUCT, meta)}


class _Made:
    """A plain page in the making."""

    def __init__(self, highest: tuple[int, int]):
        self._highest, self.size = highest, 0
        self.repeated: list[int] = []
        self.defined: list[int] = []
        self.body: list[bytes] = []

    def add(self, repeated: int, defined: int, value: bytes | None) -> None:
        self.repeated.append(repeated)
        self.defined.append(defined)
        if value is not None:
            self.body += (len(value).to_bytes(4, "little"), value)
            self.size += 4 + len(value)

    def is_full(self, value: bytes | None) -> bool:
        more = 0 if value is None else len(value)
        return bool(self.repeated) and (self.size + more > PAGE_BYTES or len(self.repeated) >= PAGE_VALUES)

    def page(self) -> bytes:
        both = zip((self.repeated, self.defined), self._highest)
        body = b"".join((*(packed_levels(stored, most) for stored, most in both), *self.body))
        data: Struct = {1: (I32, len(self.repeated)), 2: (I32, PLAIN), 3: (I32, RLE), 4: (I32, RLE)}
        size = (I32, len(body))
        return write_struct({1: (I32, DATA), 2: size, 3: size, 5: (STRUCT, data)}) + body


def _page(header: Struct, begin: int) -> Page:
    try:
        kind, unpacked_size, packed = (header[field][1] for field in (1, 2, 3))
        checksum = header[4][1] & 0xFFFFFFFF if 4 in header else None
        sizes = (kind, begin, packed, unpacked_size, checksum)
        if kind == DATA_2:
            told = header[8][1]
            is_packed = told.get(7, (0, True))[1]
            return Page(*sizes, told[1][1], told[4][1], (told[6][1], told[5][1], is_packed))
        if kind == DATA:
            told = header[5][1]
            return Page(*sizes, told[1][1], told[2][1], None, (told[4][1], told[3][1]))
        return Page(*sizes, header[7][1][1][1] if kind == DICTIONARY else 0, PLAIN)
    except (KeyError, TypeError, IndexError):
        raise Fault("a page's header is none") from None


@contextmanager
def _plain_faults(what: str) -> Iterator[None]:
    """Fields that are missing, or of another kind."""
    try:
        yield
    except pa.ArrowException:  # some are ValueErrors
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Fault(what) from error


class SmallPages:
    """A parquet file whose row groups are read with small pages, by pyarrow. Holds the file open until `close`.

    ``meta``: its footer; ``scratch``: a folder for dictionaries that are too large for memory, for `group`.
    """

    def __init__(self, path: Path, meta: pq.FileMetaData, scratch: Path | None = None):
        self._scratch, self._schema = scratch, meta.schema
        self._file = path.open("rb")
        fd = self._file.fileno()
        end = os.fstat(fd).st_size - 8  # the footer's length and four letters
        length = int.from_bytes(os.pread(fd, 4, end), "little")
        with _plain_faults("its footer is damaged"):
            self._footer = read_struct(os.pread(fd, length, end - length))[0]

    def close(self) -> None:
        self._file.close()

    def unpacked_bytes(self, number: int, leaf: int) -> int:
        """Of the values of a column of byte strings in row group ``number``, however often one is stored."""
        with _plain_faults("its footer or a page is damaged"):
            told = self._footer[4][1][1][number][1][1][1][leaf]
            rows = self._footer[4][1][1][number][3][1]
            return Column(self._file.fileno(), told, self._schema.column(leaf), rows).unpacked_bytes()

    @contextmanager
    def group(self, number: int, leaves: list[int], share: int) -> Iterator[tuple[pq.ParquetFile, float]]:
        """(a file of this row group alone, how many rows are at most ``share`` bytes of the columns ``leaves``, as far
        as pages tell).

        Raises OSError and pyarrow's errors, also while it is read, for what is damaged.
        """
        with ExitStack() as stack:
            with _plain_faults("its footer or a page's header is damaged"):
                group, shown, rows = self._shown(number, leaves, share, stack)
                file = stack.enter_context(self._opened(group, shown))
            yield file, rows

    def _shown(self, number: int, leaves: list[int], share: int, stack: ExitStack) -> tuple[Struct, _Shown, float]:
        group: Struct = self._footer[4][1][1][number]
        told, total = list(group[1][1][1]), group[3][1]
        shown, rows = _Shown(self._file.fileno()), float(total)
        for leaf in leaves:
            column = Column(shown.fd, told[leaf], self._schema.column(leaf), total)
            if not column.is_plain:
                continue
            place = (leaf + 1) * _APART
            if column.is_remade():
                dictionary = Dictionary(column.dictionary_values(), self._scratch)
                stack.callback(dictionary.close)
                longest = dictionary.longest
                shown.made[leaf + 1] = _Pieces(column.small_pages(dictionary))
                told[leaf] = column.told(place, is_remade=True)
            else:
                longest = column.longest_of_dictionary()
                shown.begin[leaf + 1] = column.begin
                told[leaf] = column.told(place, is_remade=False)
            rows = min(rows, column.rows_of(share, total, longest))
        return {**group, 1: (LIST, (STRUCT, told))}, shown, rows

    def _opened(self, group: Struct, shown: _Shown) -> pq.ParquetFile:
        kept = {field: value for field, value in self._footer.items() if field not in (8, 9)}  # how it is encrypted
        footer = write_struct({**kept, 3: (I64, group[3][1]), 4: (LIST, (STRUCT, [group]))})
        alone = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
        return pq.ParquetFile(
            pa.PythonFile(shown, mode="r"),
            metadata=pq.read_metadata(pa.BufferReader(alone)),
            buffer_size=PIECE,
            pre_buffer=False,
            page_checksum_verification=True,
        )


class _Shown:
    """The file that pyarrow is shown: the real one at 0, and column n of the row group at n * _APART."""

    closed = False

    def __init__(self, fd: int):
        self.fd, self._at = fd, 0
        self.begin = {0: 0}
        self.made: dict[int, _Pieces] = {}

    def read(self, size: int) -> bytes:
        number, offset = divmod(self._at, _APART)
        made = self.made.get(number)
        data = made.read(offset, size) if made else os.pread(self.fd, size, self.begin.get(number, 0) + offset)
        self._at += len(data)
        return data

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        self._at = at + (0, self._at, (max([*self.begin, *self.made]) + 1) * _APART)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        """The file is closed by who opened it."""


class _Pieces:
    """What is made on the way, read once from its start to its end."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._held, self._at = pieces, b"", 0

    def read(self, at: int, size: int) -> bytes:
        if at != self._at:
            raise OSError(f"pages are read at {at} that are at {self._at}")
        parts, missing = [], size
        while missing:
            self._held = self._held or next(self._pieces, b"")
            if not self._held:
                break
            parts.append(self._held[:missing])
            missing -= len(parts[-1])
            self._held = self._held[len(parts[-1]) :]
        self._at += size - missing
        return b"".join(parts)
