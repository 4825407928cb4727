"""All hard prompts and a number of workers: each takes the next prompt and asks until enough answers are right."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prism_fast.config import CurateConfig
from prism_fast.data.formats import Dataset
from prism_fast.records import DataError, Sample
from prism_fast.stages.answers import Progress
from prism_fast.stages.curating.answer import Answer
from prism_fast.stages.curating.client import Failed, Teacher
from prism_fast.stages.curating.journal import Journal, Key
from prism_fast.stages.curating.pace import Halt, Halted
from prism_fast.stages.curating.purse import Purse
from prism_fast.stages.curating.request import body_of, key_of, most
from prism_fast.stages.curating.verdict import RIGHT, Verdict, verdict_of

KEPT, WRONG, FAILED, REPEATED, UNASKED, BAD = "kept", "none_right", "failed", "repeated", "not_asked", "bad"


class Outcome(NamedTuple):
    """Of a prompt; ``right``: its right answers, by their keys."""

    index: int
    state: str
    right: tuple[Key, ...] = ()


@dataclass
class Asking:
    """One run over the prompts. ``reasons`` and ``mended`` count answers."""

    config: CurateConfig
    data: Dataset
    journal: Journal
    teacher: Teacher
    purse: Purse
    halt: Halt
    told: Progress | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    over_bound: int = 0  # answers that counted more than was thought possible
    fault: DataError | None = None
    _seen: set[str] = field(default_factory=set)
    _failed: int = 0  # prompts in a row
    _done: int = 0

    async def run(self, hard: Sequence[int]) -> list[Outcome]:
        """In the order of ``hard``. What is under way when the command ends is waited for: it is paid. Raises DataError
        for what ends it."""
        left, outcomes = iter(hard), []
        at_once = range(self.config.teacher.concurrency)
        workers = [asyncio.ensure_future(self._work(left, outcomes, len(hard))) for _ in at_once]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self.fault is not None:
            raise self.fault
        return sorted(outcomes)

    async def _work(self, left: Iterator[int], outcomes: list[Outcome], total: int) -> None:
        for index in left:
            if self.halt.at_once:
                break
            try:
                outcomes.append(await self._prompt(index))
            except DataError as error:
                self.fault = self.fault or error
                self.halt.now("a fault", at_once=True)
            self._done += 1
            if self.told is not None:
                self.told(self._done, total)

    async def _prompt(self, index: int) -> Outcome:
        sample = self.data[index]
        prompt = key_of(sample)
        if prompt in self._seen:
            return Outcome(index, REPEATED)
        self._seen.add(prompt)
        right: list[Key] = []
        body = None
        for number in range(self.config.samples):
            key = Key(prompt, number)
            try:
                if key not in self.journal:
                    self.halt.check()
                    try:
                        body = body or await asyncio.to_thread(body_of, sample, self.config.teacher)
                    except DataError as error:
                        self.data.skip(index, error)
                        return Outcome(index, BAD)
                    await self._ask(key, sample, body)
            except Halted:
                return Outcome(index, KEPT if right else UNASKED, tuple(right))
            except Failed as error:
                self._count_failure(error)
                return Outcome(index, KEPT if right else FAILED, tuple(right))
            if await self._is_right(self.journal.answer(key), sample):
                right.append(key)
            if len(right) == self.config.right:
                break
        return Outcome(index, KEPT if right else WRONG, tuple(right))

    async def _ask(self, key: Key, sample: Sample, body: bytes) -> None:
        """The answer, into the journal."""
        bound = most(sample, self.config.teacher)

        def lose() -> None:
            self.journal.lose(key, bound)
            self.purse.check()

        await self.purse.reserve(bound)
        try:
            self.journal.begin(key, bound)
            answer = await self.teacher.ask(body, bound, lose)
            self.journal.add(key, answer, bound)
        except (Failed, Halted, DataError):
            self.journal.end(key)
            raise
        finally:
            await self.purse.release(bound)
        self._failed = 0
        self.over_bound += answer.usage is not None and sum(answer.usage) > sum(bound)

    async def _is_right(self, answer: Answer, sample: Sample) -> bool:
        verdict: Verdict = await asyncio.to_thread(verdict_of, answer, sample, self.config)
        self.reasons[verdict.reason] += 1
        if verdict.mended:
            self.mended[verdict.mended] += 1
        return verdict.reason == RIGHT

    def _count_failure(self, error: Failed) -> None:
        self._failed += 1
        if self._failed >= self.config.teacher.failures_in_a_row:
            raise DataError(
                f"{self.config.teacher.url}: {self._failed} prompts in a row failed (teacher.failures_in_a_row), the "
                f"last by {error}; go on later by the same command"
            )
