"""What `--dry-run` says, and what is looked at before anything is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prism_fast.config import CurateConfig
from prism_fast.data.formats import Dataset, read_rlvr
from prism_fast.records import DataError
from prism_fast.reward import started
from prism_fast.run.lock import FILE_NAME as LOCK
from prism_fast.stages.curating import hard, journal
from prism_fast.stages.curating.answer import Tokens
from prism_fast.stages.curating.purse import cost
from prism_fast.stages.curating.request import key_of, most, settings_of
from prism_fast.stages.curating.verdict import RIGHT, verdict_of


def plan(config: CurateConfig) -> Iterator[str]:
    """What would be asked, in lines; writes and asks nothing. Answers that are there are judged."""
    refuse_other_folder(config.out)
    with started(config.reward):
        data = read_rlvr(config.data.files, **config.data.reading)
        if hard.is_known(config, data):
            prompts = hard.look(config, data, None, lambda _: None).hard
            yield f"{len(prompts)} hard prompts of {hard.picked(config, data)} records"
        else:
            prompts = [*range(hard.picked(config, data))]
            yield f"{len(prompts)} prompts at most: the policy has not said which are hard"
        there = journal.Journal(config.out / journal.FILE_NAME, settings_of(config.teacher), look=True)
        if len(there):
            yield f"{there.file}: {len(there)} answers are there"
        requests, bound = _left(config, data, prompts, there)
    yield f"{requests} requests at most, {bound.input:,} tokens of prompts and {bound.output:,} of answers at most"
    if (dear := cost(bound, config.teacher)) is not None:
        budget = "" if config.teacher.budget is None else f", and budget = {config.teacher.budget:g} in all"
        yield f"cost at most {dear:.2f}{budget}; requests that are lost on the way, and tried again, may come on top"
    try:
        secret_of(config, os.environ)
    except DataError as error:
        yield f"note: {error}"


def _left(config: CurateConfig, data: Dataset, prompts: Sequence[int], there: journal.Journal) -> tuple[int, Tokens]:
    """(requests, tokens) at most: as if no answer that is still to come were right."""
    requests, bound = 0, Tokens(0, 0)
    seen: set[str] = set()
    for index in prompts:
        sample = data[index]
        prompt = key_of(sample)
        if prompt in seen:  # its answers serve both
            continue
        seen.add(prompt)
        missing, right = 0, 0
        for number in range(config.samples):
            key = journal.Key(prompt, number)
            if key not in there:
                missing += 1
            elif verdict_of(there.answer(key), sample, config).reason == RIGHT:
                right += 1
            if right == config.right:
                break
        if missing:
            one = most(sample, config.teacher)
            requests, bound = requests + missing, bound.plus(Tokens(missing * one.input, missing * one.output))
    return requests, bound


def secret_of(config: CurateConfig, environment: Mapping[str, str]) -> str | None:
    """The key, of which no message says anything. Raises DataError where there is none, or it is no header's value."""
    name = config.teacher.key_variable
    if name is None:
        return None
    key = environment.get(name, "").strip()
    if not key:
        raise DataError(f"teacher.key_variable: the environment has no {name}; export it")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise DataError(f"teacher.key_variable: what {name} holds is no key; correct it")
    return key


def refuse_other_folder(out: Path) -> None:
    """Raises DataError where ``out`` holds what is not of an earlier start of this command."""
    ours = {journal.FILE_NAME, f"{hard.FILE_NAME}.partial"}
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if there - {LOCK} and not there & ours:
        raise DataError(f"{out}: holds other files and no journal of this command; choose another out")
