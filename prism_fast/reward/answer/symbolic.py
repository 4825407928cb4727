"""Symbolic comparison ("x+1" = "1+x") by math-verify, in a process of its own with limits on work and memory.

Safe to call from any thread and after a fork; no signal handler is installed here. The process is started at the first
question, started anew if it dies, and ends with this one.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import selectors
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from prism_fast.records import DataError

CALLS = 600_000  # Python calls that all symbolic comparisons of one judgement may take together: 0.2 to 0.5 s
SECONDS = 0.9  # of CPU time, for what the calls do not count
WALL = 10 * SECONDS  # without any progress: a guard against a hang, which decides no verdict
REPLY_SECONDS = 120.0  # the same for the process as a whole
START_SECONDS = 600.0  # of the wall clock; a start takes 1 to 3 s of CPU time
CACHE_SIZE = 16_384

log = logging.getLogger(__name__)


class JudgeError(DataError, RuntimeError):
    """math-verify's process cannot be started: one line that says why, and the remedy."""


@dataclass
class Allowance:
    """What the symbolic comparisons of one judgement have left, and how they ended."""

    calls: int = field(default_factory=lambda: CALLS)
    seconds: float = field(default_factory=lambda: SECONDS)
    costly: bool = False  # some comparison ran out of the allowance
    late: bool = False  # some comparison has no verdict


def equal(gold: str, answer: str, allowance: Allowance) -> bool:
    """Whether math-verify takes the LaTeX ``answer`` for ``gold``.

    False, with a mark in ``allowance``, where the allowance runs out before, or where no verdict was had twice. The
    first is remembered as any verdict is, for it is the same at any load; the second is not.
    Raises JudgeError where math-verify's process cannot be started.
    """
    return _client.equal(gold, answer, allowance)


def start() -> None:
    """Start the process now, for example before training; JudgeError where that fails."""
    _client.start()


class _Died(ConnectionError):
    """The process ended in the middle of a question."""


class _Reply(NamedTuple):
    verdict: str  # yes, no, costly, failed or late; see symbolic_server.py
    calls: int
    seconds: float  # of CPU time


class _Client:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.known: dict[tuple[str, str], _Reply] = {}

    def start(self) -> None:
        with self.lock:
            self._running()

    def equal(self, gold: str, answer: str, allowance: Allowance) -> bool:
        with self.lock:
            reply = self.known.get((gold, answer))
            if allowance.calls <= 0 or allowance.seconds <= 0:
                allowance.costly = True
                return False
            if reply is None:
                whole = allowance.calls == CALLS
                reply = self._ask(gold, answer, allowance)
                if reply.verdict != "late" and (whole or reply.verdict != "costly"):
                    if len(self.known) >= CACHE_SIZE:
                        self.known.clear()
                    self.known[gold, answer] = reply
        # What is remembered costs what it cost: a verdict does not depend on what was asked before.
        costly = reply.verdict == "costly" or reply.calls > allowance.calls
        allowance.calls -= reply.calls
        allowance.seconds -= reply.seconds
        allowance.costly |= costly
        allowance.late |= reply.verdict == "late"
        return reply.verdict == "yes" and not costly

    def _ask(self, gold: str, answer: str, allowance: Allowance) -> _Reply:
        question = {"gold": gold, "answer": answer, "wall": WALL}
        question |= {"calls": allowance.calls, "seconds": max(allowance.seconds, 0.01)}
        for _attempt in (1, 2):
            try:
                verdict, calls, seconds = _converse(self._running(), question).split()
            except (_Died, TimeoutError):
                self.stop()
            else:
                if verdict != "late":
                    return _Reply(verdict, int(calls), float(seconds))
        log.warning("no verdict on the answer %r after two tries; it counts as not right, this time only", answer[:80])
        return _Reply("late", 0, 0.0)

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.stop()
        if importlib.util.find_spec("math_verify") is None:
            raise JudgeError(_MISSING.format("it is not installed"))
        paths = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}  # sets have one order
        try:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("symbolic_server.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=environment,
            )
            hello = _read_line(self.process, START_SECONDS)
        except (OSError, TimeoutError) as error:
            self.stop()
            raise JudgeError(
                f"math-verify's process did not start: {error}; try: {_TRY.format(sys.executable)}"
            ) from None
        if hello != "ready":
            self.stop()
            raise JudgeError(_MISSING.format(hello.removeprefix("missing ")))
        return self.process

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


_MISSING = (
    "symbolic answers (such as x+1 for 1+x) are compared by math-verify, and {}; "
    "install it with: pip install math-verify (it is part of the extra prism-fast[train])"
)

_TRY = "{} -c 'import math_verify'"


def _converse(process: subprocess.Popen[bytes], question: dict[str, object]) -> str:
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
    except (BrokenPipeError, ValueError) as error:
        raise _Died("the process is gone") from error
    return _read_line(process, REPLY_SECONDS)


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> str:
    """The next line of the process, without its end; TimeoutError after ``seconds``."""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            raise TimeoutError(f"no reply within {seconds:.2f} s")
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise _Died("the process ended")
    return line.decode().rstrip("\n")


_client = _Client()


def _forget_after_fork() -> None:
    """The process belongs to the parent: a forked child starts its own."""
    global _client
    _client = _Client()


atexit.register(lambda: _client.stop())
os.register_at_fork(after_in_child=_forget_after_fork)
