"""When a request may begin: rates, waits that a server asks for, and the end of a command."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from prism_fast.config import TeacherConfig
from prism_fast.stages.curating.answer import Tokens

SLICE = 1.0  # seconds between two looks at a rate, which answers that were shorter than they might be set free


class Halted(Exception):
    """The command ends: begin nothing more."""


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since any time."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Halt:
    """Whether the command ends and why; who waits is woken."""

    def __init__(self, clock: Clock):
        self.reason: str | None = None
        self.at_once = False  # nothing is made of what there is
        self._clock, self._event = clock, asyncio.Event()

    def now(self, reason: str, at_once: bool = False) -> None:
        self.reason = self.reason or reason
        self.at_once = self.at_once or at_once
        self._event.set()

    def check(self) -> None:
        if self.reason is not None:
            raise Halted

    async def sleep(self, seconds: float) -> None:
        """Raises Halted as soon as the command ends."""
        self.check()
        tasks = [asyncio.ensure_future(self._clock.sleep(seconds)), asyncio.ensure_future(self._event.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        self.check()


class Pace:
    """One after another, requests take their turn. Of r requests a minute each holds the next up for 60 / r seconds; of
    t tokens a minute one of n tokens for 60 n / t: no burst, so that no minute has more than the server allows."""

    def __init__(self, teacher: TeacherConfig, clock: Clock, halt: Halt):
        self._requests = 60 / teacher.requests_per_minute if teacher.requests_per_minute else 0.0
        self._tokens = 60 / teacher.tokens_per_minute if teacher.tokens_per_minute else 0.0
        self._clock, self._halt = clock, halt
        self._turn = asyncio.Lock()
        self._next_request = self._next_tokens = self._held = clock.now()

    async def turn(self, most: Tokens) -> None:
        """Waits for the next place; raises Halted where the command ends before."""
        async with self._turn:
            while (wait := max(self._next_request, self._next_tokens, self._held) - self._clock.now()) > 0:
                await self._halt.sleep(min(wait, SLICE))
            self._halt.check()
            now = self._clock.now()
            self._next_request = now + self._requests
            self._next_tokens = max(self._next_tokens, now) + sum(most) * self._tokens

    def settle(self, most: Tokens, used: Tokens) -> None:
        """What a request took less than it might have is free again."""
        self._next_tokens -= max(0, sum(most) - sum(used)) * self._tokens

    def hold(self, seconds: float) -> None:
        """Nobody begins for so long: a server has asked for it."""
        self._held = max(self._held, self._clock.now() + seconds)
