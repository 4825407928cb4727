"""Which prompts are hard: by the pass rate that records hold, or that a policy's responses have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prism_fast.config import CurateConfig, PairsConfig
from prism_fast.data.formats import Dataset
from prism_fast.records import DataError
from prism_fast.reward import reward_of
from prism_fast.stages.answers import Answered, Progress, Say, answers, is_answered

FILE_NAME = "rollouts.jsonl"  # of which the policy's responses lie beside, and stay there


class Looked(NamedTuple):
    """What was looked at: ``hard`` by index, easy ones by number, and responses where a policy was asked."""

    hard: list[int]
    easy: int
    answered: dict[int, Answered]


def look(config: CurateConfig, data: Dataset, progress: Progress | None, say: Say) -> Looked:
    """Raises DataError for a record without a pass rate, where one decides."""
    numbers = range(picked(config, data))
    if config.rates is not None:
        return _measured(config, data, numbers, progress, say)
    if config.max_pass_rate is None:
        return Looked([*numbers], 0, {})
    hard, easy = [], 0
    for index in numbers:
        rate = data[index].pass_rate
        if rate is None:
            data.skip(index, _no_rate(data, index))
        elif rate <= config.max_pass_rate:
            hard.append(index)
        else:
            easy += 1
    return Looked(hard, easy, {})


def is_known(config: CurateConfig, data: Dataset) -> bool:
    """Whether `look` asks no policy: none is named, or its responses are there. Writes nothing."""
    asked = rollouts(config)
    return asked is None or is_answered(asked, data, asked, range(picked(config, data)))


def picked(config: CurateConfig, data: Dataset) -> int:
    """Records that are looked at."""
    return min(len(data), config.limit or len(data))


def _no_rate(data: Dataset, index: int) -> DataError:
    return DataError(
        f"{data[index].place}: extra_info.pass_rate: missing; name its column by data.columns, name a policy that "
        "measures it in rates, or take max_pass_rate=null to ask about all prompts"
    )


def rollouts(config: CurateConfig) -> PairsConfig | None:
    """How the policy answers; None where none is asked."""
    if config.rates is None:
        return None
    rates, out = config.rates.model_dump(), config.out / FILE_NAME
    return PairsConfig(**rates, data=config.data, out=out, limit=config.limit, seed=config.seed)


def _measured(
    config: CurateConfig, data: Dataset, numbers: Sequence[int], progress: Progress | None, say: Say
) -> Looked:
    asked = rollouts(config)
    assert asked is not None
    found = answers(asked, data, asked, picked=numbers, progress=progress, say=say)
    hard, easy = [], 0
    for each in found:
        right = sum(
            reward_of(text, data[each.index], config.reward).accuracy >= config.min_accuracy for text in each.texts
        )
        if config.max_pass_rate is None or right / asked.samples <= config.max_pass_rate:
            hard.append(each.index)
        else:
            easy += 1
    return Looked(hard, easy, {each.index: each for each in found})
