"""SIGTERM, SIGHUP and Ctrl-C ask a run to stop: they are heeded at the end of a step, once its state is saved."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGHUP, Ctrl-C) and has saved its state."""

    def __init__(self, signum: int, saved: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {saved}; go on with --resume")
        self.signum = signum


class StopRequest:
    """Signals between ``__enter__`` and ``__exit__``: the first is kept in ``signum``, the second interrupts."""

    def __init__(self):
        self.signum: int | None = None  # that asked this process to stop
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup
            with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
                self._previous[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, frame: object) -> None:
        if self.signum is not None:  # a second one does not wait for the step's end
            raise KeyboardInterrupt
        self.signum = signum
