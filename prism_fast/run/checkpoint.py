"""Checkpoints: Hugging Face directories for the models, safetensors and JSON for the trainer's state.

    OUT/checkpoints/step-000100/{policy/, discriminator/, trainer.safetensors, trainer.json}

Each is written aside and renamed, so that a directory of that name is always whole. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_fast.files import write_aside
from prism_fast.records import DataError

_NAME = re.compile(r"step-(\d{6,})")

VERSION = 1
REMOVE = "remove the checkpoint to resume from an earlier one"
_KINDS = {"best": (int,), "best_value": (int, float), "threads": (int,), "skipped_updates": (int,), "run": (dict,)}


def save(
    folder: Path,
    step: int,
    models: Mapping[str, Callable[[Path], None]],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep_last: int,
    best: int | None = None,
) -> Path:
    """Writes ``folder/step-NNNNNN`` and removes all but the last ``keep_last`` and the best."""

    def write(aside: Path) -> None:
        for name, save_model in models.items():
            save_model(aside / name)
        generator = {"torch_rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            generator["cuda_rng"] = torch.cuda.get_rng_state()
        flat = {name: value.detach().cpu().contiguous() for name, value in {**tensors, **generator}.items()}
        save_file(flat, aside / "trainer.safetensors")
        (aside / "trainer.json").write_text(json.dumps({"version": VERSION, "step": step, "best": best, **state}))

    target = folder / f"step-{step:06d}"
    write_aside(target, write)
    kept = steps(folder)
    for old in kept[:-keep_last]:
        if old != best:
            shutil.rmtree(folder / f"step-{old:06d}")
    return target


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    found = [_NAME.fullmatch(path.name) for path in folder.glob("step-*")] if folder.is_dir() else []
    return sorted(int(match.group(1)) for match in found if match)


def clear_partial(folder: Path) -> None:
    """Removes what a kill has left half written; only for who holds the run's folder."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    found = steps(folder)
    return folder / f"step-{found[-1]:06d}" if found else None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint; the random states are put back. Raises DataError where it is not readable."""
    state = read_state(path)
    try:
        tensors = load_file(path / "trainer.safetensors")
        torch.set_rng_state(tensors.pop("torch_rng"))
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    cuda = tensors.pop("cuda_rng", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    return tensors, state


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises DataError where it is not readable."""
    try:
        state = json.loads((path / "trainer.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        version = state.get("version") if isinstance(state, dict) else "unknown"
        raise DataError(f"{path}/trainer.json: version {version}, expected {VERSION}")
    named = _NAME.fullmatch(path.name)
    if type(state.get("step")) is not int or (named and state["step"] != int(named.group(1))):
        raise _unreadable(path, ValueError(f"trainer.json: step is {state.get('step')!r}"))
    for key, kinds in _KINDS.items():
        if state.get(key) is not None and type(state[key]) not in kinds:
            raise _unreadable(path, ValueError(f"trainer.json: {key} is a {type(state[key]).__name__}"))
    return state


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable checkpoint ({error}); remove it to resume from an earlier one")
