"""Requests that wait for the model, few enough to be kept; what waits together is answered in one pass."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from http import HTTPStatus

from prism_fast.stages.serving.asked import Refused
from prism_fast.steps.judging import Question, Verdict

LOOK = 0.2  # seconds between looks at whether a client is still there, and whether the server goes on


class Waiting:
    """One request: its questions, and after `answer` the verdicts, or why there are none."""

    def __init__(self, questions: Sequence[Question]):
        self.questions = questions
        self.tokens = sum(item.tokens for item in questions)
        self.given_up = False
        self._answered = threading.Event()
        self._found: list[Verdict] | Refused | None = None

    def answer(self, found: list[Verdict] | Refused) -> None:
        self._found = found
        self._answered.set()

    def wait(self, seconds: float) -> list[Verdict] | None:
        """The verdicts, or None where there are none yet after so long. Raises Refused."""
        if not self._answered.wait(seconds):
            return None
        if isinstance(self._found, Refused):
            raise self._found
        return self._found


class Line:
    """At most ``most`` requests, first come, first served."""

    def __init__(self, most: int):
        self._most, self._closed = most, False
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, request: Waiting) -> None:
        """Raises Refused (503) where the line is full, or closed."""
        with self._changed:
            if self._closed:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping")
            if len(self._waiting) >= self._most:
                told = f"{self._most} requests wait already (max_waiting); come again"
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, told)
            self._waiting.append(request)
            self._changed.notify()

    def take(self, tokens: int, seconds: float) -> list[Waiting]:
        """Requests that fit in a pass of so many tokens, at least one; none where none came within ``seconds``."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._waiting and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            taken: list[Waiting] = []
            while self._waiting:
                request = self._waiting[0]
                if not request.given_up:
                    if taken and request.tokens > tokens:
                        break
                    taken.append(request)
                    tokens -= request.tokens
                self._waiting.popleft()
            return taken

    def close(self) -> None:
        """Nobody joins any more, and who waits is told so."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().answer(Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping"))
