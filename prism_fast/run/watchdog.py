"""What one process of a run does where another is gone or does not come: it says which, and ends within a bound.

Libraries tell a process that a call of all has failed, or nothing at all; not whose fault it is. So each leaves a sign
of life on the board where they met (`ranks.Board`), with the number of calls that it has come to.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import sys
import threading
import time
import traceback
from types import TracebackType

from prism_fast import ranks
from prism_fast.records import DataError

GRACE = 60.0  # seconds that a process has to end by itself
SILENCE = 5.0  # seconds without a sign of life, once a call has failed, after which a process counts as gone
TOGETHER = 10.0  # seconds in which processes that end alike do so
HUNG, GONE = "hung", "gone"  # what is wrong
LOST = "lost"  # how a process ended that is not at fault


class Lost(Exception):
    """A process of the run is gone, or does not come to what the others wait for. ``told``: by another process."""

    told = False


class Watchdog:
    """Watches over the processes of a run between ``__enter__`` and ``__exit__``; in one process it does nothing.

    Whoever finds that a call of all has failed says so on the board. The others then end within ``GRACE`` seconds,
    wherever they are, and print every thread's stack where one did not come. A process whose neighbour gives no sign of
    life for the timeout finds that too. An error that a call ended with becomes a `Lost`, of one line that names the
    process; of errors that all end with alike, those of all but the first process are marked as ``told``.
    """

    def __init__(self, timeout_minutes: float):
        self._timeout = 60 * timeout_minutes
        self._grace = min(GRACE, 2 * self._timeout)
        self._every = max(min(1.0, self._timeout / 10), ranks.world() / 64)  # seconds between signs of life
        self._over = threading.Event()
        self._since = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._board = ranks.board()
        if self._board is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def alive(self) -> None:
        """Says that this process gets on: if it is not called again in time, every thread's stack is printed."""
        self._since = time.monotonic()
        ranks.alive(self._timeout / 60)

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._over.set()
        if self._board is None:
            return
        self._thread.join()
        if error is None:
            return
        try:
            self._settle(error)
        finally:
            threading.Thread(target=self._end_late, daemon=True).start()

    def _settle(self, error: BaseException) -> None:
        """What the others are to know of this error, and what they have to say of it."""
        lost = ranks.is_lost(error)
        hung = lost and re.search("timed? ?out", str(error), re.IGNORECASE) is not None
        if hung:
            traceback.print_exception(error)
        if isinstance(error, DataError):
            error.told = self._is_told(str(error))
        elif lost:
            raise self._lost(HUNG if hung else GONE) from error
        elif isinstance(error, Exception):
            self._is_told(f"{type(error).__name__}: {error}"[:200])

    def _end_late(self) -> None:
        """A process that has failed ends, also where one of its threads waits for ever."""
        time.sleep(self._grace)
        os._exit(1)

    def _watch(self) -> None:
        """A sign of life every now and then, until it is over or something is wrong."""
        assert self._board is not None
        neighbour = (ranks.rank() + 1) % ranks.world()
        beats, heard, heard_at = 0, None, time.monotonic()
        while not self._over.wait(self._every):
            beats += 1
            try:
                self._board.post(f"alive/{ranks.rank()}", f"{beats} {ranks.calls()}")
                if (trouble := self._board.read("trouble")) is not None:
                    self._board.post(f"left/{ranks.rank()}", "")
                    return self._end(trouble, found=False)
                sign = self._board.read(f"alive/{neighbour}")
            except ConnectionError:
                return self._end(GONE, found=True)
            if sign != heard:
                heard, heard_at = sign, time.monotonic()
            elif time.monotonic() - heard_at > self._timeout:
                return self._end(HUNG, found=True)

    def _end(self, trouble: str, *, found: bool) -> None:
        """Within the grace, wherever the main thread is. ``found``: here, so that it is to be told."""
        if trouble == HUNG and time.monotonic() - self._since < self._timeout:  # else they are printed already
            faulthandler.dump_traceback(all_threads=True)
        if not self._over.wait(self._grace):
            if found and not (lost := self._lost(trouble)).told:
                print(f"error: {lost}", file=sys.stderr, flush=True)
            os._exit(1)

    def _lost(self, trouble: str) -> Lost:
        """What there is to say, the same in all processes; the one that is the first to look for it tells."""
        first, found = True, None
        with contextlib.suppress(ConnectionError):
            board = self._board
            assert board is not None
            board.post(f"ended/{ranks.rank()}", LOST)
            first = board.is_first("looked")
            if first:
                board.post("verdict", self._verdict(board))
                board.post("trouble", trouble)  # not before: who reads it gives no more signs of life
            found = self._wait_for(board, "verdict")
            self._leave(board)
        lost = Lost(f"{found or 'rank 0, or what started it, has ended'}; start again with --resume")
        lost.told = not first
        return lost

    def _verdict(self, board: ranks.Board) -> str:
        """Which process has ended, gives no sign of life, or has come to fewer calls than the others."""
        world, others = ranks.world(), [r for r in range(ranks.world()) if r != ranks.rank()]
        before = {r: board.read(f"alive/{r}") or "0 0" for r in others}
        after, end = dict(before), time.monotonic() + max(SILENCE, 5 * self._every)
        while any(after[r] == before[r] for r in others) and time.monotonic() < end:
            time.sleep(0.2)
            after = {r: board.read(f"alive/{r}") or "0 0" for r in others}
        ended = {r: board.read(f"ended/{r}") for r in others}
        for r, error in ended.items():
            if error not in (None, LOST):
                return f"rank {r} of {world} has ended alone ({error})"
        silent = [r for r in others if after[r] == before[r] and ended[r] is None]
        if silent:
            board.post("silent", json.dumps(silent))
            ends = "has ended, or its machine does" if len(silent) == 1 else "have ended, or their machines do"
            return f"{_name(silent)} of {world} {ends} not answer"
        came = {r: int(after[r].split()[1]) for r in others} | {ranks.rank(): ranks.calls()}
        late = [r for r, count in came.items() if count < max(came.values())]
        if late:
            return f"{_name(late)} of {world} did not come to what the others wait for; stacks say where each was"
        return "a call of all processes failed, and none of them is missing"

    def _is_told(self, text: str) -> bool | None:
        """Whether the first process ends with the same error, which it tells; None where that is not known."""
        with contextlib.suppress(ConnectionError):
            board = self._board
            assert board is not None
            board.post(f"ended/{ranks.rank()}", text)
            told = not ranks.is_first() and self._wait_for(board, "ended/0") == text
            self._leave(board)
            return told
        return None

    def _wait_for(self, board: ranks.Board, key: str) -> str | None:
        end = time.monotonic() + TOGETHER + SILENCE + 5 * self._every
        while (found := board.read(key)) is None and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _leave(self, board: ranks.Board) -> None:
        """The first process may hold the board, which others have yet to read."""
        board.post(f"left/{ranks.rank()}", "")
        if ranks.is_first():
            gone = json.loads(board.read("silent") or "[]")
            for rank in [r for r in range(1, ranks.world()) if r not in gone]:
                if self._wait_for(board, f"left/{rank}") is None:
                    break


def _name(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"
