"""Encoded records as bytes for another process, and back: JSON for what they are, their numbers as they lie in memory.

Nothing is pickled: bytes can make nothing but what is listed here.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_fast.records import ImageRef, Lesson, Message, PairRecord, Prompt, Sample, Seen

_RECORDS: dict[str, type] = {cls.__name__: cls for cls in (ImageRef, Lesson, Message, PairRecord, Prompt, Sample, Seen)}
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.int64)}
_DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.int32, torch.uint8, torch.bool)}
_ALIGNED = 64


def to_bytes(value: Any) -> bytes:
    """Of records, tensors, texts, bytes, paths and numbers, in lists and tuples. Raises TypeError for anything else."""
    blobs: list[bytes] = []
    header = json.dumps([_plain(value, blobs), [len(blob) for blob in blobs]]).encode()
    parts = [len(header).to_bytes(8, "little"), header]
    for blob in blobs:
        parts += [bytes(-sum(map(len, parts)) % _ALIGNED), blob]
    return b"".join(parts)


def from_bytes(data: bytes) -> Any:
    """The value that `to_bytes` was given; its tensors share one copy of ``data``."""
    memory = bytearray(data)
    end = 8 + int.from_bytes(memory[:8], "little")
    plain, sizes = json.loads(memory[8:end])
    places = []
    for size in sizes:
        start = end + -end % _ALIGNED
        places.append((start, size))
        end = start + size
    return _value(plain, memory, places)


def _plain(value: Any, blobs: list[bytes]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if kind in _DTYPES:
            blobs.append(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
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


def _value(plain: Any, memory: bytearray, places: list[tuple[int, int]]) -> Any:
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
        return bytes(memory[start : start + size])
    if "path" in plain:
        return Path(plain["path"])
    if "record" in plain:
        made = {key: _value(item, memory, places) for key, item in plain["fields"].items()}
        return _RECORDS[plain["record"]](**made)
    ((name, items),) = plain.items()
    return {"list": list, "tuple": tuple}[name](_value(item, memory, places) for item in items)


def _fields(cls: Any) -> list[str]:
    return [field.name for field in fields(cls)] if is_dataclass(cls) else list(cls._fields)
