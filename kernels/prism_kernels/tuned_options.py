"""Block sizes tuned on a GPU: ``<op>/tables/<gpu>.json`` where its GPU is this one, else the op's defaults.

Autotuning at run time would need a driver, time and luck, and would differ between ranks; a checked-in table does not.
``make gpu PART=tune`` (benchmarks/gpu/tune.py) writes the tables of the GPU it runs on; the compile gate compiles what
they say. Without a table, and none is checked in so far, an op's defaults run. A table::

    {"gpu": "NVIDIA H200", "date": "...", "commit": "...", "versions": {"torch": "...", "triton": "..."},
     "entries": {"tile 2": {"options": {"BLOCK_N": 256, "num_warps": 8}, "us": ..., "default_us": ...}}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
_forced: dict[tuple[str, str], dict[str, Any]] = {}
_asked: dict[tuple[str, str], dict[str, Any]] = {}
_as_if: list[str] = []


def tuned(op: str, key: str, default: Mapping[str, Any]) -> dict[str, Any]:
    """``default`` with what the current GPU's table says of ``key``; unchanged without a GPU or a table.

    Args:
        op: the op's package.
        key: one tuned launch of it, with whatever bins it ("tile 2": tiles of two-byte elements). Never a length.
        default: launch options, "num_warps" and "num_stages" among them.

    Raises:
        ValueError: the table names an option that ``default`` does not have.
    """
    _asked[op, key] = dict(default)
    entry = _forced.get((op, key))
    if entry is None:
        gpu = _as_if[-1] if _as_if else _name(torch.cuda.current_device()) if torch.cuda.is_available() else ""
        entry = _entries(op, gpu).get(key, {}) if gpu else {}
    if not set(entry) <= set(default):
        raise ValueError(
            f"{op} table, {key!r}: options {sorted(set(entry) - set(default))} are not the kernel's "
            f"{sorted(default)}; tune again (make gpu PART=tune)"
        )
    return {**default, **entry}


def gpus(op: str) -> list[str]:
    """Names of the GPUs that have a table of this op."""
    return [json.loads(path.read_text())["gpu"] for path in sorted((ROOT / op / "tables").glob("*.json"))]


def table_path(op: str, gpu: str) -> Path:
    """Where the table of an op lies for a GPU of this name."""
    return ROOT / op / "tables" / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@contextmanager
def as_if(gpu: str) -> Iterator[None]:
    """Within it, :func:`tuned` reads the tables of this GPU; "" for none. For the compile gate."""
    _as_if.append(gpu)
    try:
        yield
    finally:
        _as_if.pop()


@contextmanager
def forced(op: str, key: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Within it, ``options`` win over default and table. For the tuner."""
    _forced[op, key] = dict(options)
    try:
        yield
    finally:
        del _forced[op, key]


def asked() -> dict[tuple[str, str], dict[str, Any]]:
    """{(op, key): default} of every launch so far: what can be tuned, and that the op reads its table."""
    return dict(_asked)


@lru_cache
def _name(device: int) -> str:
    return torch.cuda.get_device_name(device)


@lru_cache(maxsize=64)
def _entries(op: str, gpu: str) -> dict[str, dict[str, Any]]:
    path = table_path(op, gpu)
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    if table["gpu"] != gpu:
        raise ValueError(f"{path}: is a table of {table['gpu']!r}, expected {gpu!r}")
    return {key: entry["options"] for key, entry in table["entries"].items()}
