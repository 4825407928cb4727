"""SIGTERM, SIGHUP and Ctrl-C while a teacher is asked."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_fast.run.signals import Stopped
from prism_fast.stages.curating.pace import Halt


class StoppedAsking(Stopped):
    """A signal ended the command; what was answered is in the journal."""

    def __init__(self, signum: int, saved: Path):
        super().__init__(signum, saved)
        self.args = (f"stopped by {signal.Signals(signum).name}; answers are in {saved}; go on by the same command",)


@contextlib.contextmanager
def signals(halt: Halt) -> Iterator[list[int]]:
    """Those that came. After the first nothing more is begun, and what is under way is waited for: it is paid; the
    second ends that too."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    got: list[int] = []
    before: dict[int, Any] = {}

    def stop(signum: int) -> None:
        got.append(signum)
        halt.now(signal.Signals(signum).name, at_once=True)
        if len(got) > 1 and task is not None:
            task.cancel()

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        handler = signal.getsignal(signum)
        if signum == signal.SIGHUP and handler == signal.SIG_IGN:
            continue
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: the caller handles signals
            loop.add_signal_handler(signum, stop, signum)
            before[signum] = handler
    try:
        yield got
    finally:
        for signum, handler in before.items():
            loop.remove_signal_handler(signum)
            signal.signal(signum, handler)
