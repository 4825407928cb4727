"""Bytes of a parquet page by and by: unpacked in pieces of about PIECE, whatever the page's size.

pyarrow unpacks snappy and LZ4 blocks only whole, so these two are written out here, after their descriptions:
https://github.com/google/snappy/blob/main/format_description.txt
https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from prism_fast.data.thrift import Fault

PIECE = 1 << 18
WINDOW = (
    1 << 20
)  # how far back snappy and LZ4 may refer; LZ4 may 64 KiB, and writers of snappy work by blocks of 64 KiB

PLAIN, SNAPPY, GZIP, BROTLI, ZSTD, LZ4_RAW = 0, 1, 2, 4, 6, 7  # the codecs' numbers in a footer
_NAMES = {SNAPPY: "snappy", GZIP: "gzip", BROTLI: "brotli", ZSTD: "zstd", LZ4_RAW: "lz4_raw"}
CODECS = (PLAIN, *_NAMES)


class Stream:
    """``size`` unpacked bytes of a page, taken from its start to its end."""

    def __init__(self, pieces: Iterator[bytes], size: int):
        self._pieces, self._held, self._at, self.left = pieces, b"", 0, size

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes. Raises Fault where the page has not so many."""
        if size > self.left:
            raise Fault(f"{size} bytes are told where a page has {self.left} left")
        self.left -= size
        if size <= len(self._held) - self._at:
            self._at += size
            return self._held[self._at - size : self._at]
        parts, size = [self._held[self._at :]], size - len(self._held) + self._at
        while True:
            self._held = next(self._pieces, b"")
            if not self._held:
                raise Fault("a page has fewer bytes than it says")
            self._at = min(size, len(self._held))
            parts.append(self._held[: self._at])
            size -= self._at
            if not size:
                return b"".join(parts)

    def finish(self) -> None:
        """Reads what is left, for its checksum."""
        more = self.left - len(self._held) + self._at
        for piece in self._pieces:
            more -= len(piece)
            if more < 0:
                raise Fault("a page unpacks to more bytes than it says")

    def varint(self) -> int:
        number = shift = 0
        while shift < 70:
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7
        raise Fault("a number has more than 64 bits")


def unpacked(packed: Iterator[bytes], codec: int, size: int) -> Iterator[bytes]:
    """``size`` bytes that ``codec`` made into ``packed``. Raises OSError for what is not so."""
    if codec == PLAIN:
        return packed
    if size == 0:
        return iter(())
    if codec == SNAPPY:
        return _snappy(packed, size)
    if codec == LZ4_RAW:
        return _lz4(packed, size)
    return _streamed(packed, _NAMES[codec])


def unpacked_at_once(packed: bytes, codec: int, size: int) -> bytes:
    """As `unpacked`, of a small page."""
    if size == 0:  # an empty dictionary, in the byte or more that a codec makes of it
        return b""
    return packed if codec == PLAIN else pa.decompress(packed, size, _NAMES[codec], asbytes=True)


class _Readable:
    """Pieces as a file that pyarrow reads."""

    closed = False

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._held = pieces, b""

    def read(self, size: int = -1) -> bytes:
        self._held = self._held or next(self._pieces, b"")
        got, self._held = self._held[:size], self._held[size:]
        return got

    def close(self) -> None:
        """The source stays open."""


def _streamed(packed: Iterator[bytes], name: str) -> Iterator[bytes]:
    source = pa.PythonFile(_Readable(packed), mode="r")
    stream = pa.CompressedInputStream(source, name)
    while got := stream.read(PIECE):
        yield got
    for _ in packed:  # what follows is part of the checksum
        pass


class _Packed:
    """Bytes of a block, looked at one by one, and what was made of the last ones."""

    def __init__(self, pieces: Iterator[bytes], size: int):
        self.pieces, self.data, self.at = pieces, b"", 0
        self.window, self.missing = bytearray(), size

    def fill(self, count: int = 16) -> None:
        """So that ``count`` bytes are there, if the block has them: an IndexError tells that it has not."""
        while len(self.data) - self.at < count and (piece := next(self.pieces, b"")):
            self.data, self.at = self.data[self.at :] + piece, 0

    def number(self, width: int) -> int:
        self.at += width
        if self.at > len(self.data):
            raise IndexError
        return int.from_bytes(self.data[self.at - width : self.at], "little")

    def literal(self, size: int) -> Iterator[bytes]:
        while size:
            self.fill(1)
            part = self.data[self.at : self.at + size]
            if not part:
                raise IndexError
            self.at += len(part)
            size -= len(part)
            self._made(len(part))
            self.window += part
            yield from self.ready()

    def copy(self, back: int, size: int) -> None:
        window, begin = self.window, len(self.window) - back
        if back <= 0 or begin < 0:
            raise Fault(f"a packed page refers back by {back} bytes, of {len(window)} that are kept")
        self._made(size)
        if back >= size:
            window += window[begin : begin + size]
        else:
            window += (window[begin:] * (size // back + 1))[:size]

    def _made(self, size: int) -> None:
        self.missing -= size
        if self.missing < 0:
            raise Fault("a page unpacks to more bytes than it says")

    def ready(self) -> Iterator[bytes]:
        """What nothing can refer to any more."""
        if len(self.window) > 2 * WINDOW:
            yield bytes(self.window[:-WINDOW])
            del self.window[:-WINDOW]

    def rest(self) -> Iterator[bytes]:
        yield bytes(self.window)
        self.fill(1)
        if self.at < len(self.data):
            raise Fault("a packed page has more bytes than it needs")


def _snappy(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    packed = _Packed(pieces, size)
    packed.fill()
    told = shift = 0
    while shift < 35:
        byte = packed.number(1)
        told |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if told != size:
        raise Fault(f"{told} bytes unpacked where a page says {size}")
    while packed.missing:
        packed.fill()
        tag = packed.number(1)
        kind, count = tag & 3, tag >> 2
        if kind == 0:
            yield from packed.literal(1 + (count if count < 60 else packed.number(count - 59)))
            continue
        if kind == 1:
            packed.copy((tag >> 5) << 8 | packed.number(1), 4 + (count & 7))
        else:
            packed.copy(packed.number(2 if kind == 2 else 4), 1 + count)
        yield from packed.ready()
    yield from packed.rest()


def _lz4(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    packed = _Packed(pieces, size)

    def length(count: int) -> int:
        while count >= 15:
            packed.fill()
            byte = packed.number(1)
            count += byte
            if byte < 255:
                break
        return count

    while packed.missing:
        packed.fill()
        token = packed.number(1)
        yield from packed.literal(length(token >> 4))
        if packed.missing:  # the last of a block are literals
            packed.fill()
            back = packed.number(2)
            count = 4 + length(token & 15)
            for done in range(0, count, WINDOW):
                packed.copy(back, min(WINDOW, count - done))
                yield from packed.ready()
    yield from packed.rest()
