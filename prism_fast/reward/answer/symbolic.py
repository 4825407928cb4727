"""Symbolic comparison ("x+1" = "1+x") by math-verify, in a process of its own with time and memory limits.

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
import time
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 0.9  # what all symbolic comparisons of one judgement may take together
START_SECONDS = 60.0
CACHE_SIZE = 16_384
_GRACE = 0.1  # for the reply of a server that has to kill a child at its limit

log = logging.getLogger(__name__)


@dataclass
class Allowance:
    """The time that the symbolic comparisons of one judgement have left, in seconds."""

    seconds: float = field(default_factory=lambda: SECONDS)


def equal(gold: str, answer: str, allowance: Allowance) -> bool:
    """Whether math-verify takes the LaTeX ``answer`` for ``gold``; False where ``allowance`` runs out before.

    Raises RuntimeError where math-verify is not installed.
    """
    return _client.equal(gold, answer, allowance)


def start() -> None:
    """Start the process now, for example before training; RuntimeError where math-verify is not installed."""
    _client.start()


class _Died(ConnectionError):
    """The process ended in the middle of a question."""


class _Client:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.known: dict[tuple[str, str], bool] = {}

    def start(self) -> None:
        with self.lock:
            self._running()

    def equal(self, gold: str, answer: str, allowance: Allowance) -> bool:
        question = (gold, answer)
        if question in self.known:
            return self.known[question]
        with self.lock:
            if question in self.known or allowance.seconds <= 0:
                return self.known.get(question, False)
            whole = allowance.seconds == SECONDS
            verdict = self._ask(gold, answer, allowance)
            if verdict != "late" or whole:  # with more time left, the verdict may be another
                if len(self.known) >= CACHE_SIZE:
                    self.known.clear()
                self.known[question] = verdict == "yes"
            return verdict == "yes"

    def _ask(self, gold: str, answer: str, allowance: Allowance) -> str:
        for attempt in (1, 2):
            process = self._running()
            started = time.monotonic()
            try:
                return _converse(process, {"gold": gold, "answer": answer, "seconds": allowance.seconds})
            except _Died:
                self.stop()
                if attempt == 2:
                    log.warning("math-verify's process died twice on %r; the answer counts as wrong", answer[:80])
            except TimeoutError:
                self.stop()
                return "late"
            finally:
                allowance.seconds -= time.monotonic() - started
        return "failed"

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.stop()
        if importlib.util.find_spec("math_verify") is None:
            raise RuntimeError(_MISSING.format("it is not installed"))
        paths = [path or os.getcwd() for path in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("symbolic_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            hello = _read_line(self.process, START_SECONDS)
        except (_Died, TimeoutError) as error:
            self.stop()
            raise RuntimeError(f"math-verify's process did not start within {START_SECONDS:.0f} s: {error}") from error
        if hello != "ready":
            self.stop()
            raise RuntimeError(_MISSING.format(hello))
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


def _converse(process: subprocess.Popen[bytes], question: dict[str, object]) -> str:
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
    except (BrokenPipeError, ValueError) as error:
        raise _Died("the process is gone") from error
    return _read_line(process, question["seconds"] + _GRACE)


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
