"""Checkpoints changed by hand: as if they had been written so, or behind their manifest's back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prism_fast.run import checkpoint


def edit_state(path: Path, **changes: Any) -> dict[str, Any]:
    """trainer.json of a checkpoint with some values changed (... removes one), and its manifest, which agrees."""
    file = path / checkpoint.STATE
    state = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in state.items() if value is not ...}))
    manifest = path / checkpoint.MANIFEST
    told = json.loads(manifest.read_text())
    told["files"][checkpoint.STATE] = checkpoint.digest(file)
    manifest.write_text(json.dumps(told))
    return state


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def tear(file: Path) -> None:
    """The first half of it."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {"flipped": flip, "torn": tear, "missing": Path.unlink}
