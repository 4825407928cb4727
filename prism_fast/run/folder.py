"""What lies in a run's folder before it begins: a run to resume, or what no run may be written over."""

from __future__ import annotations

from pathlib import Path

from prism_fast.records import DataError
from prism_fast.run import checkpoint, record
from prism_fast.run.lock import FILE_NAME as LOCK
from prism_fast.run.monitor import FILE_NAME as METRICS


def begun(out: Path) -> bool:
    """Whether a run has begun in this folder: it can be resumed, from step 0 where nothing was saved yet."""
    return (out / LOCK).exists() or bool(checkpoint.steps(out / "checkpoints"))


def refuse_other_folder(out: Path, stage: str, resume: bool) -> None:
    """Raises DataError where no run may begin in this folder, or none can be resumed. Before it is locked."""
    if any((out / file).exists() for file in ("config.json", "model.safetensors")):
        raise DataError(f"{out}: is the folder of a model; choose another run.out, such as {out}-{stage}")
    if resume and not begun(out):
        raise DataError(f"{out}: holds no run to resume; correct run.out, or leave out --resume to begin one")


def refuse_earlier_run(out: Path, resume: bool) -> None:
    """Raises DataError where what lies in this folder is in the way of a run. When nobody else works in it."""
    checkpoints, final = out / "checkpoints", out / "final"
    for folder in (checkpoints, final):
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder}: is a file, expected a folder; choose another run.out")
    for file in (METRICS, record.FILE_NAME):
        if (out / file).is_dir():
            raise DataError(f"{out / file}: is a folder, expected a file; choose another run.out")
    if not resume and (final.exists() or checkpoint.steps(checkpoints)):
        raise DataError(f"{out}: holds an earlier run; add --resume to go on, or choose another run.out")
    if not record.is_ours(out / record.FILE_NAME):
        raise DataError(f"{out / record.FILE_NAME}: is of another program; choose another run.out")
