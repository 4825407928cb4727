"""Weights & Biases and TensorBoard behind one configuration key; both are optional packages."""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Literal, Protocol, get_args

from prism_fast.records import DataError

Tracker = Literal["none", "wandb", "tensorboard"]


class Log(Protocol):
    """Where figures go besides metrics.jsonl."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_tracker(tracker: str) -> None:
    """Raises DataError where the package of ``tracker`` is not installed, ValueError where the name is another."""
    if tracker not in get_args(Tracker):
        raise ValueError(f"tracker: expected one of {', '.join(get_args(Tracker))}, got {tracker!r}")
    if tracker == "none":
        return
    found = importlib.util.find_spec(tracker)
    if found is None or found.origin is None:  # no origin: a folder of that name, such as the ./wandb of earlier runs
        raise DataError(
            f"tracker: the package {tracker} is not installed: pip install {tracker}, or set tracker to none"
        )


def open_tracker(tracker: Tracker, stage: str, out: Path, start_step: int) -> Log | None:
    """The log that ``tracker`` names, or None for "none". A resumed run (``start_step`` > 0) goes on with its own.

    ``out`` is the stage's folder and exists. Raises as `check_tracker`.
    """
    check_tracker(tracker)
    if tracker == "none":
        return None
    return _WeightsAndBiases(stage, out, start_step) if tracker == "wandb" else _TensorBoard(out, start_step)


class _WeightsAndBiases:
    def __init__(self, stage: str, out: Path, start_step: int):
        import wandb

        identity = out / "wandb_id"  # a resumed run must find its own page again
        if not start_step or not identity.exists():
            identity.write_text(uuid.uuid4().hex[:16], encoding="ascii")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "prism-fast"),
            name=f"{out.resolve().parent.name}/{stage}",
            dir=str(out),
            id=identity.read_text(encoding="ascii").strip(),
            resume="allow",
            settings=wandb.Settings(console="off"),  # its capture of the terminal breaks the progress bar
        )

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, out: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1 if start_step else 0)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
