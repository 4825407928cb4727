"""Encoded records as bytes for another process, and back: JSON for what they are, their numbers as they lie in memory.

Nothing is pickled: bytes can make nothing but what is listed here.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_fast.data.shared_memory import SharedMemory
from prism_fast.records import ImageRef, Lesson, Message, PairRecord, Prompt, Sample, Seen

_RECORDS: dict[str, type] = {cls.__name__: cls for cls in (ImageRef, Lesson, Message, PairRecord, Prompt, Sample, Seen)}
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.int64)}
_DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.int32, torch.uint8, torch.bool)}
_ALIGNED = 64
_SHARED_FROM = 1 << 16  # bytes
_PLACE = struct.Struct("<qq")  # before a message: its size, and where it lies in shared memory, or -1: it follows
_MOST_PIECES = 512  # for one call of the system; Linux takes 1024
Parts = list[bytes | memoryview]


def to_parts(value: Any) -> Parts:
    """Of records, tensors, texts, bytes, paths and numbers, in lists and tuples; tensors as they lie in memory, not
    copied. Raises TypeError for anything else."""
    blobs: Parts = []
    header = json.dumps([_plain(value, blobs), [len(blob) for blob in blobs]]).encode()
    parts: Parts = [len(header).to_bytes(8, "little"), header]
    end = 8 + len(header)
    for blob in blobs:
        parts += [bytes(-end % _ALIGNED), blob]
        end += -end % _ALIGNED + len(blob)
    return parts


def to_bytes(value: Any) -> bytes:
    """The same in one piece."""
    return b"".join(to_parts(value))


def from_bytes(data: bytes | np.ndarray[Any, Any]) -> Any:
    """The value that `to_bytes` was given; its tensors share one copy of ``data``, or ``data`` itself where it is an
    array (n,) uint8."""
    memory = np.frombuffer(bytearray(data), np.uint8) if isinstance(data, bytes) else data
    end = 8 + int.from_bytes(memory[:8].tobytes(), "little")
    plain, sizes = json.loads(memory[8:end].tobytes())
    places = []
    for size in sizes:
        start = end + -end % _ALIGNED
        places.append((start, size))
        end = start + size
    return _value(plain, memory, places)


def send(line: socket.socket, parts: Parts, memory: SharedMemory | None = None) -> None:
    """One message, by ``memory`` where it is large and has room there. Raises OSError where nobody reads any more."""
    size = sum(map(len, parts))
    start = memory.write(parts, size) if memory is not None and size >= _SHARED_FROM else None
    place = _PLACE.pack(size, -1 if start is None else start)
    left = [memoryview(part) for part in ((place, *parts) if start is None else (place,))]
    at = 0
    while at < len(left):
        sent = line.sendmsg(left[at : at + _MOST_PIECES])
        while at < len(left) and sent >= len(left[at]):
            sent -= len(left[at])
            at += 1
        if sent:
            left[at] = left[at][sent:]


def receive(line: socket.socket, memory: SharedMemory | None = None) -> np.ndarray[Any, Any]:
    """The next message, (n,) uint8. Raises EOFError or OSError where nobody writes any more."""
    size, start = _PLACE.unpack(_filled(line, np.empty(_PLACE.size, np.uint8)))
    if start < 0 or memory is None:
        return _filled(line, np.empty(size, np.uint8))
    return memory.read(start, size)


def _filled(line: socket.socket, memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    left = memoryview(memory)
    while left:
        count = line.recv_into(left)
        if not count:
            raise EOFError
        left = left[count:]
    return memory


def _plain(value: Any, blobs: Parts) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if kind in _DTYPES:
            blobs.append(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            return {"tensor": len(blobs) - 1, "dtype": kind, "shape": list(value.shape)}
    if isinstance(value, bytes):
        blobs.append(value)
        return {"bytes": len(blobs) - 1}
    if isinstance(value, Path):
        return {"path": str(value)}
    name = type(value).__name__
    if _RECORDS.get(name) is type(value):
        return {"record": name, "fields": {key: _plain(getattr(value, key), blobs) for key in _fields(type(value))}}
    if type(value) in (list, tuple):
        return {name: [_plain(item, blobs) for item in value]}
    raise TypeError(f"{name}: expected records, tensors, texts, bytes, paths and numbers; add it to data/wire.py")


def _value(plain: Any, memory: np.ndarray[Any, Any], places: list[tuple[int, int]]) -> Any:
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        start, size = places[plain["tensor"]]
        dtype = _DTYPES[plain["dtype"]]
        if not size:
            return torch.empty(plain["shape"], dtype=dtype)
        return torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=start).view(plain["shape"])
    if "bytes" in plain:
        start, size = places[plain["bytes"]]
        return memory[start : start + size].tobytes()
    if "path" in plain:
        return Path(plain["path"])
    if "record" in plain:
        made = {key: _value(item, memory, places) for key, item in plain["fields"].items()}
        return _RECORDS[plain["record"]](**made)
    ((name, items),) = plain.items()
    return {"list": list, "tuple": tuple}[name](_value(item, memory, places) for item in items)


@cache
def _fields(cls: Any) -> list[str]:
    return [field.name for field in fields(cls)] if is_dataclass(cls) else list(cls._fields)
