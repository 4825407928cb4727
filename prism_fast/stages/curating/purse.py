"""What requests cost, and the budget that no request may break."""

from __future__ import annotations

import asyncio

from prism_fast.config import TeacherConfig
from prism_fast.stages.curating.answer import Tokens
from prism_fast.stages.curating.journal import Journal
from prism_fast.stages.curating.pace import Halt

BUDGET = "the budget is used up"
NONE = Tokens(0, 0)


def cost(tokens: Tokens, teacher: TeacherConfig) -> float | None:
    """None where prices are not given."""
    if teacher.input_price is None or teacher.output_price is None:
        return None
    return (tokens.input * teacher.input_price + tokens.output * teacher.output_price) / 1e6


class Purse:
    """A request begins only where the most that it may cost, beside what is spent and under way, is in the budget."""

    def __init__(self, teacher: TeacherConfig, journal: Journal, halt: Halt):
        self._teacher, self._journal, self._halt = teacher, journal, halt
        self._reserved = NONE
        self._changed = asyncio.Condition()

    def _spent(self, more: Tokens) -> float:
        tokens = self._journal.counted.plus(self._journal.assumed).plus(self._reserved).plus(more)
        return cost(tokens, self._teacher) or 0.0

    async def reserve(self, most: Tokens) -> None:
        """Waits for requests under way where it may fit after them; raises Halted where the command ends."""
        async with self._changed:
            while self._teacher.budget is not None and self._spent(most) > self._teacher.budget:
                self._halt.check()
                if self._reserved == NONE:
                    self._halt.now(BUDGET)
                else:
                    await self._changed.wait()
            self._halt.check()
            self._reserved = self._reserved.plus(most)

    async def release(self, most: Tokens) -> None:
        async with self._changed:
            self._reserved = Tokens(self._reserved.input - most.input, self._reserved.output - most.output)
            self._changed.notify_all()

    def check(self) -> None:
        """After a try that may have been paid: its request, tried again, may be one too many."""
        if self._teacher.budget is not None and self._spent(NONE) > self._teacher.budget:
            self._halt.now(BUDGET)
