"""`prism-fast data curate`: hard prompts, a teacher's answers to them, and of these the right ones as training data."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from prism_fast.config import CurateConfig
from prism_fast.data.formats import Dataset, read_rlvr
from prism_fast.data.unread import not_written
from prism_fast.records import DataError
from prism_fast.reward import started
from prism_fast.run.lock import FolderLock
from prism_fast.stages.answers import Progress, Say
from prism_fast.stages.curating import hard, journal, made, request
from prism_fast.stages.curating.asking import Asking, Outcome
from prism_fast.stages.curating.client import Teacher
from prism_fast.stages.curating.pace import Clock, Halt, Pace, SystemClock
from prism_fast.stages.curating.plan import refuse_other_folder, secret_of
from prism_fast.stages.curating.purse import Purse
from prism_fast.stages.curating.stopping import StoppedAsking, signals


def curate(
    config: CurateConfig,
    rolled: Progress | None = None,
    asked: Progress | None = None,
    say: Say = print,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Writes sft.json, alignment.parquet, warmup.jsonl where a policy was asked, and report.json into config.out, and
    returns the report. Raises DataError where no answer is right, and for what ends the asking; StoppedAsking."""
    key = secret_of(config, os.environ)
    refuse_other_folder(config.out)
    with FolderLock(config.out, "out"), started(config.reward):
        data = read_rlvr(config.data.files, **config.data.reading)
        looked = hard.look(config, data, rolled, say)
        say(f"{len(looked.hard)} hard prompts of {hard.picked(config, data)} records")
        kept = journal.Journal(config.out / journal.FILE_NAME, request.settings_of(config.teacher))
        if len(kept):
            say(f"{kept.file}: goes on with {len(kept)} answers that are there")
        with contextlib.closing(kept):
            asking, outcomes = asyncio.run(_ask(config, data, kept, key, looked.hard, clock or SystemClock(), asked))
        report = made.account(config, looked, hard.picked(config, data), asking, outcomes)
        right = made.Kept(data, kept, looked, outcomes)
        report["written"] = made.write_files(config, right) if len(right) else {}
        made.write_report(config, report)
        if data.unread:
            say(not_written(data.unread))
    if not len(right):
        raise DataError(f"{config.out / made.REPORT}: no answer was kept ({report['stopped'] or 'it says why'})")
    return report


async def _ask(
    config: CurateConfig,
    data: Dataset,
    kept: journal.Journal,
    key: str | None,
    prompts: list[int],
    clock: Clock,
    asked: Progress | None,
) -> tuple[Asking, list[Outcome]]:
    halt = Halt(clock)
    pace = Pace(config.teacher, clock, halt)
    async with Teacher(config.teacher, key, pace, halt, config.seed) as teacher:
        asking = Asking(config, data, kept, teacher, Purse(config.teacher, kept, halt), halt, asked)
        with signals(halt) as got:
            try:
                outcomes = await asking.run(prompts)
            except asyncio.CancelledError:
                if not got:
                    raise
            if got:
                raise StoppedAsking(got[0], kept.file)
    return asking, outcomes
