"""What all commands share: how a process begins, and how it ends. Help texts load this, so it loads no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from prism_fast import DataError

UsageError = typer.BadParameter.__mro__[1]  # of the click that this typer brings

OTHERS_WAIT = 10.0  # seconds
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}  # what to write


class Commands(TyperGroup):
    """How every command ends: bad input is one line on stderr and exit status 2, a run that was stopped 128 + its
    signal, and where one of several processes is lost it is 1.

    SIGTERM is how launchers and schedulers ask for an end: a run that has saved has done so, with status 0.
    """

    def make_context(self, *args: Any, **options: Any) -> Any:
        with one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: typer.Context) -> object:
        with one_line():
            return super().invoke(ctx)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """What ends a command in this context does it as `Commands` says."""
    try:
        yield
    except (DataError, UsageError) as error:
        text = str(error)
        if isinstance(error, UsageError):
            text = _usage(error)
        _complain(f"error: {' '.join(text.split())}", getattr(error, "told", None))
        sys.exit(2)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        file = f"{error.filename}: " if error.filename else ""
        _complain(f"error: {file}{error.strerror}; free space there, or choose another folder", None)
        sys.exit(2)
    except _of_a_run("signals", "Stopped") as stop:
        if not _rank():  # all processes have stopped together
            print(str(stop), file=sys.stderr)
        sys.exit(0 if stop.signum == signal.SIGTERM else 128 + stop.signum)
    except _of_a_run("watchdog", "Lost") as lost:
        _complain(f"error: {lost}", lost.told)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; what was not saved by a checkpoint is lost", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _usage(error: Any) -> str:
    """What is wrong with a command line."""
    command = error.ctx.command_path if error.ctx else "prism-fast"
    said = error.format_message().removesuffix(".") or "no command"
    takes = {parameter.name for parameter in error.ctx.command.params} if error.ctx else set()
    plain = ", and write settings without dashes, as in run.seed=1"
    hint = plain if hasattr(error, "option_name") and "overrides" in takes else ""
    return f"{command}: {said}; see {command} --help{hint}"


def _complain(text: str, told: bool | None) -> None:
    """One line on stderr. Of several processes that end alike the first one tells, and whoever started them ends the
    others; one that fails alone tells by itself. ``told``: whether another does; None: not known."""
    if rank := _rank():
        if told is None:
            time.sleep(OTHERS_WAIT)
        text = f"rank {rank}: {text}"
    if not told:
        print(text, file=sys.stderr)


def place() -> tuple[int, int]:
    """(rank, number of processes) of this process's run. Where nothing is said of others, torch is not loaded to find
    out. Raises DataError as `ranks.place` does."""
    if not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        return 0, 1
    from prism_fast import ranks

    return ranks.place(os.environ)[:2]


def alone() -> None:
    """Raises DataError where a launcher has started several processes of a command that runs in one."""
    if (world := place()[1]) > 1:
        raise DataError(f"this command runs in one process, got {world}; start it without torchrun")


def _rank() -> int:
    try:
        return place()[0]
    except DataError:  # which is told already
        return 0


def _of_a_run(module: str, name: str) -> Any:
    """An exception of runs: none where no run was begun, so that a help text loads no torch."""
    loaded = sys.modules.get(f"prism_fast.run.{module}")
    return () if loaded is None else getattr(loaded, name)


def home(value: Any) -> Any:
    """~ where a shell has left it, as in --out=~/x."""
    if isinstance(value, list):
        return [home(path) for path in value]
    try:
        return value if value is None else Path(value).expanduser()
    except RuntimeError as error:
        raise DataError(f"{value}: {error}") from None


def spin_briefly() -> None:
    """Threads of a parallel loop spin a little at its end, then sleep, unless the user has said how they wait.

    A thread that spins for long keeps the core that the last one needs, and a run beside other busy processes crawls;
    one that sleeps at once is woken late at every one of a small model's many loops (dev/LOG.md has both). OpenMP
    reads this once, when torch is loaded; the bits of a result are the same.
    """
    ways = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}  # turns; milliseconds
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", *ways} & os.environ.keys():
        os.environ.update(ways)


def interruptible(terminable: bool = False) -> None:
    """From here on Ctrl-C is an exception, that cleans up; before, prism_fast/__main__.py ends the process at once.
    ``terminable``: SIGTERM too, of which no run takes notice: a temporary folder may hold as much as the data."""

    process = os.getpid()

    def end(signum: int, _: object) -> None:
        if os.getpid() != process:  # forked just now: nothing of its parent's is to be cleaned up there
            os._exit(128 + signum)
        sys.exit(128 + signum)

    with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if terminable and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, end)


def quiet_libraries() -> None:
    """Libraries say nothing of their own on a terminal: no bars, and no warnings about their next version."""
    for library in ("torch", "transformers", "huggingface_hub", "tokenizers", "pyarrow", "sympy"):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{library}(\..*)?$")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
