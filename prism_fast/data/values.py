"""Values of a parquet page of byte strings, one by one, and what of it stands before them.

Encodings: https://github.com/apache/parquet-format/blob/master/Encodings.md
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, repeat
from pathlib import Path

import numpy as np

from prism_fast.data.thrift import Fault, read_varint, varint
from prism_fast.data.unpack import Stream

PLAIN, PLAIN_DICTIONARY, RLE, DELTA_LENGTHS, DELTA_STRINGS, RLE_DICTIONARY = 0, 2, 3, 6, 7, 8
DICTIONARIES = (PLAIN_DICTIONARY, RLE_DICTIONARY)
ENCODINGS = (PLAIN, *DICTIONARIES, DELTA_LENGTHS, DELTA_STRINGS)

MOST_NUMBERS = 256 << 20  # bytes of a page's levels, or of its numbers in a dictionary, which are read at once
IN_MEMORY = 16 << 20  # of a dictionary; a larger one lies in a file
_GROUPS = 512  # of eight numbers that are unpacked at once


class Dictionary:
    """Values that data pages name by number; large ones in a file of ``folder`` that ends with this process."""

    def __init__(self, values: Iterable[bytes], folder: Path | None):
        self.longest, self._start = 0, array("q", [0])
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=folder and str(folder), prefix="dictionary-")  # noqa: SIM115
        for value in values:
            self._file.write(value)
            self._start.append(self._start[-1] + len(value))
            self.longest = max(self.longest, len(value))

    def __getitem__(self, number: int) -> bytes:
        if number + 1 >= len(self._start):
            raise Fault(f"value {number} of a dictionary of {len(self._start) - 1}")
        self._file.seek(self._start[number])
        return self._file.read(self._start[number + 1] - self._start[number])

    def close(self) -> None:
        self._file.close()


def values_of(stream: Stream, encoding: int, most: int, dictionary: Dictionary | None = None) -> Iterator[bytes]:
    """All values that ``stream`` holds, at ``most`` so many, in order."""
    if encoding in DICTIONARIES:
        if dictionary is None:
            raise Fault("a page names values of a dictionary that is missing")
        yield from map(dictionary.__getitem__, named(stream))
    elif encoding == PLAIN:
        while stream.left:
            yield stream.take(int.from_bytes(stream.take(4), "little"))
    elif encoding == DELTA_LENGTHS:
        yield from map(stream.take, _deltas(stream, most))
    else:
        before, value = _deltas(stream, most), b""
        for same, length in zip(before, _deltas(stream, most)):
            if same > len(value):
                raise Fault("a value repeats more of the one before than there is")
            value = value[:same] + stream.take(length)
            yield value


def named(stream: Stream) -> Iterator[int]:
    """Numbers in a dictionary, and a few that mean nothing behind the last."""
    if stream.left:
        width = stream.take(1)[0]
        yield from numbers(numbers_part(stream, stream.left), width, None)


def numbers_part(stream: Stream, size: int) -> bytes:
    if size > MOST_NUMBERS:
        raise Fault(f"a page has {size} bytes of levels or of numbers in a dictionary, above {MOST_NUMBERS}")
    return stream.take(size)


def named_runs(stream: Stream, count: int) -> Iterator[tuple[list[int], int]]:
    """As `named`, ``count`` of them, by `runs`."""
    if stream.left and count:
        width = stream.take(1)[0]
        yield from runs(numbers_part(stream, stream.left), width, count)


def level_count(data: bytes, highest: int, count: int) -> int:
    """How many of `levels` are ``highest``."""
    if not highest:
        return count
    return sum(found.count(highest) * times for found, times in runs(data, highest.bit_length(), count))


def levels(data: bytes, highest: int, count: int) -> Iterator[int]:
    """``count`` levels of 0 to ``highest``; where that is 0 they are not stored."""
    return numbers(data, highest.bit_length(), count) if highest else repeat(0, count)


def packed_levels(numbers: list[int], highest: int) -> bytes:
    """As a data page of the first version begins."""
    if not highest:
        return b""
    runs = b"".join(varint(len(list(run)) << 1) + bytes([level]) for level, run in groupby(numbers))
    return len(runs).to_bytes(4, "little") + runs


def numbers(data: bytes, width: int, count: int | None) -> Iterator[int]:
    """Runs and packed groups of numbers of ``width`` bits: ``count`` of them, or all."""
    found = _numbers(data, width)
    return found if count is None else _exactly(found, count)


def runs(data: bytes, width: int, count: int) -> Iterator[tuple[list[int], int]]:
    """As `numbers`, in (some numbers, how often each follows itself): a run of any length at once."""
    for found, times in _runs(data, width):
        times = min(times, count)
        found = found[:count] if times == 1 else found
        yield found, times
        count -= len(found) * times
        if not count:
            return
    if count:
        raise Fault(f"{count} levels are missing")


def _exactly(found: Iterator[int], count: int) -> Iterator[int]:
    for number in islice(found, count):
        count -= 1
        yield number
    if count:
        raise Fault(f"{count} levels are missing")


def _numbers(data: bytes, width: int) -> Iterator[int]:
    for found, times in _runs(data, width):
        yield from found if times == 1 else repeat(found[0], times)


def _runs(data: bytes, width: int) -> Iterator[tuple[list[int], int]]:
    """Several numbers once each, or one often."""
    if width > 32:
        raise Fault(f"numbers of {width} bits")
    if not width:  # a dictionary of one value
        yield [0], 1 << 62
    at, size = 0, (width + 7) // 8
    while at < len(data):
        head, at = read_varint(data, at)
        if head & 1:
            end = at + (head >> 1) * width
            for begin in range(at, min(end, len(data)), _GROUPS * width):
                yield _bits(data[begin : min(begin + _GROUPS * width, end)], width), 1
            at = end
        else:
            if size > len(data) - at:
                raise Fault("a run without its number")
            if head >> 1:
                yield [int.from_bytes(data[at : at + size], "little")], head >> 1
            at += size


def _bits(data: bytes, width: int) -> list[int]:
    """Numbers of ``width`` bits, the lowest first; what is missing of the last group of eight is 0."""
    short = -len(data) % width
    bits = np.unpackbits(np.frombuffer(data + bytes(short), np.uint8), bitorder="little").reshape(-1, width)
    return (bits.astype(np.uint64) << np.arange(width, dtype=np.uint64)).sum(axis=1, dtype=np.uint64).tolist()


def _deltas(stream: Stream, most: int) -> array[int]:
    """Lengths, each as its difference to the one before."""
    block, parts, count, last = stream.varint(), stream.varint(), stream.varint(), _signed(stream.varint())
    if not (0 < parts <= 4096 and 0 < block <= 1 << 20) or block % parts or block // parts % 8:
        raise Fault(f"lengths in {parts} parts of blocks of {block}")
    if count > min(most, MOST_NUMBERS // 8) or last < 0:
        raise Fault(f"{count} lengths of {most} values, the first of {last} bytes")
    lengths = array("q", [last] if count else [])
    while len(lengths) < count:
        least = _signed(stream.varint())
        for width in stream.take(parts):
            if len(lengths) == count:
                break
            if width > 64:
                raise Fault(f"lengths of {width} bits")
            part = block // parts
            more = _bits(stream.take(part * width // 8), width) if width else [0] * part
            for delta in more[: count - len(lengths)]:
                last += least + delta
                if not 0 <= last < 1 << 31:
                    raise Fault(f"a value of {last} bytes")
                lengths.append(last)
    return lengths


def _signed(number: int) -> int:
    return number >> 1 ^ -(number & 1)
