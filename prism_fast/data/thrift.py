"""Thrift's compact protocol, as much as footers and page headers of parquet use: structs as {field: (kind, value)}.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
DEEPEST = 30  # structs and lists in each other; parquet's own are seven

Struct = dict[int, tuple[int, Any]]
List = tuple[int, list[Any]]  # (kind of the entries, entries)


class Fault(OSError):
    """Bytes that are no struct."""


def read_struct(data: bytes | memoryview, at: int = 0) -> tuple[Struct, int]:
    """(the struct that begins at ``at``, where it ends). Raises Fault for what is none, IndexError where it is cut."""
    return _read_struct(data, at, 0)


def write_struct(struct: Struct) -> bytes:
    out = bytearray()
    _write_struct(struct, out)
    return bytes(out)


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """(number, where it ends)."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
        if shift > 63:
            raise Fault("a number has more than 64 bits")


def _read_struct(data: bytes | memoryview, at: int, depth: int) -> tuple[Struct, int]:
    if depth > DEEPEST:
        raise Fault("structs in each other without an end")
    struct: Struct = {}
    field = 0
    while data[at]:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            field += step
        else:
            field, at = _signed(data, at)
        if kind in (TRUE, FALSE):
            struct[field] = (TRUE, kind == TRUE)
        else:
            value, at = _read(data, at, kind, depth)
            struct[field] = (kind, value)
    return struct, at + 1


def _signed(data: bytes | memoryview, at: int) -> tuple[int, int]:
    number, at = read_varint(data, at)
    return number >> 1 ^ -(number & 1), at


def _sliced(data: bytes | memoryview, at: int, size: int) -> tuple[bytes, int]:
    if size > len(data) - at:
        raise IndexError
    return bytes(data[at : at + size]), at + size


def _read(data: bytes | memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE, BYTE):  # an entry of a list
        return data[at], at + 1
    if kind in (I16, I32, I64):
        return _signed(data, at)
    if kind == DOUBLE:
        return _sliced(data, at, 8)
    if kind == BINARY:
        size, at = read_varint(data, at)
        return _sliced(data, at, size)
    if kind in (LIST, SET):
        return _read_list(data, at, depth + 1)
    if kind == STRUCT:
        return _read_struct(data, at, depth + 1)
    raise Fault(f"a field of the unknown kind {kind}")


def _read_list(data: bytes | memoryview, at: int, depth: int) -> tuple[List, int]:
    if depth > DEEPEST:
        raise Fault("lists in each other without an end")
    kind, size = data[at] & 15, data[at] >> 4
    at += 1
    if size == 15:
        size, at = read_varint(data, at)
    if size > len(data) - at:  # an entry has a byte at least
        raise IndexError
    entries = []
    for _ in range(size):
        entry, at = _read(data, at, kind, depth)
        entries.append(entry)
    return (kind, entries), at


def _write_struct(struct: Struct, out: bytearray) -> None:
    last = 0
    for field in sorted(struct):
        kind, value = struct[field]
        if kind == TRUE:
            kind = TRUE if value else FALSE
        if 0 < field - last < 16:
            out.append(field - last << 4 | kind)
        else:
            out.append(kind)
            out += varint(field << 1 ^ field >> 63)
        last = field
        _WRITE.get(kind, _write_nothing)(value, out)
    out.append(0)


def _write_nothing(value: Any, out: bytearray) -> None:
    """A bool is its kind."""


def _write_byte(value: int, out: bytearray) -> None:
    out.append(value)


def _write_int(value: int, out: bytearray) -> None:
    out += varint(value << 1 if value >= 0 else ~(value << 1))


def _write_raw(value: bytes, out: bytearray) -> None:
    out += value


def _write_binary(value: bytes, out: bytearray) -> None:
    out += varint(len(value)) + value


def _write_list(value: List, out: bytearray) -> None:
    kind, entries = value
    if len(entries) < 15:
        out.append(len(entries) << 4 | kind)
    else:
        out.append(0xF0 | kind)
        out += varint(len(entries))
    write = _WRITE.get(kind, _write_byte)  # a bool is a byte here; an empty list of some writers is of kind 0
    for entry in entries:
        write(entry, out)


_WRITE: dict[int, Callable[[Any, bytearray], None]] = {
    BYTE: _write_byte,
    I16: _write_int,
    I32: _write_int,
    I64: _write_int,
    DOUBLE: _write_raw,
    BINARY: _write_binary,
    LIST: _write_list,
    SET: _write_list,
    STRUCT: _write_struct,
}
