"""Checkpoints written beside the run that goes on: a step waits for the copy to host memory alone.

Every process writes its part in a thread; once all have, the first one makes a checkpoint of the parts. What the
threads tell each other goes through a process group of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import NamedTuple, TypeVar

from prism_fast import ranks
from prism_fast.files import system_reason, write_aside
from prism_fast.records import DataError
from prism_fast.run import checkpoint

REMEDY = "free space or restore access there"
T = TypeVar("T")


class Outcome(NamedTuple):
    """What became of a checkpoint."""

    step: int
    refused: str | None  # why the system has not written it: those before are as they were


class Saver:
    """One checkpoint at a time. ``start`` and ``wait`` are calls of all processes."""

    def __init__(self, folder: Path, keep_last: int, timeout_minutes: float):
        self.folder, self.keep_last = folder, keep_last
        self._group = ranks.another_group(timeout_minutes)
        self._thread: Thread | None = None
        self._outcome: Outcome | None = None
        self._fault: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether ``wait`` would not."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, part: checkpoint.Part) -> None:
        """Begins to write a checkpoint; the one before has been waited for."""
        assert self._thread is None
        self._thread = Thread(target=self._run, args=(part,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> Outcome | None:
        """What became of the checkpoint that was begun; None where none was. Raises what is no fault of the system."""
        if self._thread is None:
            return None
        self._thread.join()
        outcome, fault, self._thread, self._outcome, self._fault = self._outcome, self._fault, None, None, None
        if fault is not None:
            raise fault
        return outcome

    def _run(self, part: checkpoint.Part) -> None:
        """In a thread."""
        try:
            with ranks.through(self._group):
                self._outcome = Outcome(part.step, self._write(part))
        except Exception as error:  # noqa: BLE001 (whatever it is, `wait` raises it)
            self._fault = error

    def _write(self, part: checkpoint.Part) -> str | None:
        """What the system said, if it refused, to any of the processes."""
        aside = checkpoint.aside(self.folder, part.step)
        if ranks.is_first():
            shutil.rmtree(aside, ignore_errors=True)
        ranks.gather(None)  # none begins before that
        files, error = _attempt(lambda: part.write(checkpoint.own_folder(self.folder, part.step, ranks.rank())))
        said = ranks.gather([files, *_told(error)])
        refused, wrong = (next((each[i] for each in said if each[i] is not None), None) for i in (1, 2))
        if ranks.is_first() and refused is wrong is None:
            _, error = _attempt(lambda: self._commit(part, [files for files, _, _ in said]))
            refused, wrong = _told(error)
        if ranks.is_first() and not refused is wrong is None:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
        refused, wrong = ranks.from_first([refused, wrong])
        if wrong is not None:
            raise error if error is not None and _told(error)[1] is not None else DataError(wrong)
        return refused

    def _commit(self, part: checkpoint.Part, parts: list[checkpoint.Files]) -> None:
        checkpoint.commit(self.folder, part.step, parts)
        checkpoint.prune(self.folder, self.keep_last, part.best)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """(what it gives, None), or (None, what it raises): the others must hear of it first."""
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 (libraries raise whatever they like where a disk is full)
        return None, error


def _told(error: Exception | None) -> tuple[str | None, str | None]:
    """(what the system refused, what else is wrong)."""
    reason = None if error is None or isinstance(error, DataError) else system_reason(error)
    wrong = None if error is None or reason is not None else str(error) or type(error).__name__
    return reason, wrong


def write_final(final: Path, models: Mapping[str, checkpoint.SaveModel], folder: Path) -> None:
    """Writes ``final/NAME`` of each model. Raises DataError where the system refuses; ``folder``: of checkpoints."""

    def write(aside: Path) -> None:
        for name, save_model in models.items():
            save_model(aside / name)

    try:
        write_aside(final, write)
    except Exception as error:
        reason, _ = _told(error)
        if reason is None:
            raise
        kept = checkpoint.latest(folder) or "step 0"
        raise DataError(
            f"{final}: could not be written ({reason}); {REMEDY}, then go on with --resume from {kept}"
        ) from error


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """(the newest checkpoint that is as it was written, what is wrong with each newer one); a call of all processes.

    Each of them reads a share of the files. Raises DataError where none is whole that is there.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(ranks.from_first(checkpoint.steps(folder))):
        path = folder / f"step-{step:06d}"
        with ranks.together():
            found = checkpoint.fault(path, ranks.rank(), ranks.world())
        found = next((fault for fault in ranks.gather(found) if fault is not None), None)
        if found is None:
            return path, damaged
        damaged[path] = found
    if damaged:
        path, found = next(iter(damaged.items()))
        raise DataError(
            f"{path}: not as it was written ({found}), and no earlier checkpoint is whole; remove {folder} to begin at "
            "step 0"
        )
    return None, damaged
