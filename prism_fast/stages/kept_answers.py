"""OUT.partial: responses of an interrupted command, a line a block, behind one of its settings and data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prism_fast.data.formats import Dataset
from prism_fast.files import writing
from prism_fast.records import DataError
from prism_fast.run import record

FIRST = b'{"stage": '  # what OUT.partial begins with
AFTER = ("out", "low", "high", "keep", "reward", "hard_negatives")  # settings that responses do not depend on


def partial_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def begun_by(config: Any) -> dict[str, Any]:
    made = record.record(type(config).__name__, config)
    return {**made, "config": {key: value for key, value in made["config"].items() if key not in AFTER}}


def append(file: Path, begun: dict[str, Any] | None, block: dict[str, Any]) -> None:
    lines = [json.dumps(each) for each in (begun, block) if each is not None]
    with writing(file), open(file, "w" if begun else "a", encoding="utf-8") as journal:
        journal.write("".join(f"{line}\n" for line in lines))
        journal.flush()
        os.fsync(journal.fileno())


def blocks_of(file: Path, begun: dict[str, Any], config: Any, data: Dataset) -> list[dict[str, Any]]:
    """The blocks of an interrupted command; what was being written when it ended is cut off."""
    if not file.exists():
        return []
    with writing(file):
        *lines, torn = file.read_bytes().split(b"\n")
    if not lines and torn[: len(FIRST)] == FIRST[: len(torn)]:
        return []  # it ended before a block was there
    try:
        before, *blocks = map(json.loads, lines)
        changed = record.changes(before, begun, config)
        data.bad.load(blocks[-1]["bad"] if blocks else {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a command's kept responses ({error}); remove it") from None
    if changed and blocks:
        raise DataError(f"{file}: was begun with other settings: {'; '.join(changed)}; set them back, or remove it")
    if torn:
        with writing(file):
            os.truncate(file, file.stat().st_size - len(torn))
    return [] if changed else blocks
