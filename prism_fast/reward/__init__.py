"""Rewards: the format of a response (`response_format.py`) and whether its answer is right (`answer/`, `is_right`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from prism_fast.config import OwnReward
from prism_fast.records import Sample
from prism_fast.response_format import (
    Parts,
    answer_element,
    count_caption_items,
    count_reasoning_steps,
    is_valid,
    split_parts,
)
from prism_fast.reward.answer import is_right, judge
from prism_fast.reward.own import function_of

__all__ = [
    "Parts",
    "Reward",
    "answer_element",
    "count_caption_items",
    "count_reasoning_steps",
    "is_right",
    "is_valid",
    "reward_of",
    "split_parts",
    "started",
    "verifiable_reward",
]


@dataclass(frozen=True)
class Reward:
    """The reward of one response. ``accuracy`` is 0.0 or 1.0, or what a function of a user's own says.

    Where it is 0.0 for want of a verdict, ``late`` or ``costly`` says so: the process that compares expressions gave
    none, twice, or the comparison is beyond its limits (`answer/README.md`).
    """

    score: float
    accuracy: float
    format_valid: bool
    late: bool = False
    costly: bool = False


def reward_of(
    response: str, sample: Sample, own: OwnReward, *, accuracy_weight: float = 0.8, format_weight: float = 0.2
) -> Reward:
    """The reward of a response to ``sample``, by the judge or by the function that ``own`` names.

    A function that replaces the accuracy is asked about responses of valid format alone; one that replaces the reward
    about all of them, and its value is also the accuracy. Raises as `verifiable_reward` does, and DataError for a fault
    of the function.
    """
    weights = {"accuracy_weight": accuracy_weight, "format_weight": format_weight}
    if own.function is None:
        return verifiable_reward(response, cast(str, sample.gold), equivalents=sample.equivalents, **weights)
    valid = is_valid(response)
    if own.replaces == "reward":
        value = function_of(own)(response, sample)
        return Reward(value, value, valid)
    if not valid:
        return Reward(0.0, 0.0, False)
    accuracy = function_of(own)(response, sample)
    return Reward(accuracy_weight * accuracy + format_weight, accuracy, True)


@contextmanager
def started(own: OwnReward) -> Iterator[None]:
    """Loads the function that ``own`` names, if any, before what takes long, and ends its process after it; DataError
    where it does not load."""
    if own.function is None:
        yield
        return
    function = function_of(own)
    try:
        yield
    finally:
        function.stop()


def verifiable_reward(
    response: str,
    gold: str,
    *,
    equivalents: Sequence[str] = (),
    accuracy_weight: float = 0.8,
    format_weight: float = 0.2,
) -> Reward:
    """``accuracy_weight * accuracy + format_weight``; all zero where the format is invalid (docs/method.md 5).

    response: the whole text of a response, without end-of-turn. gold, equivalents: right answers; meeting one suffices.
    An empty answer and one of 1,024 characters or more has accuracy 0. May be called from any thread.

    Raises ValueError for an argument of the wrong type or an empty ``gold``, RuntimeError in one line where symbolic
    answers are to be compared and math-verify is not installed or does not start.

    >>> verifiable_reward("<caption>3; 7</caption><think>3+7=10</think><answer>10</answer>", "10")
    Reward(score=1.0, accuracy=1.0, format_valid=True)
    """
    if not isinstance(response, str):
        raise ValueError(f"response: expected a string, got {type(response).__name__}")
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError(f"gold: expected a string that is not empty, got {gold!r}; correct the record's ground truth")
    if isinstance(equivalents, str | None) or not all(isinstance(text, str) for text in equivalents):
        raise ValueError(f"equivalents: expected a sequence of strings, got {equivalents!r}")
    parts = split_parts(response)
    if parts is None:
        return Reward(0.0, 0.0, False)
    verdict = judge(parts.answer, gold, equivalents)
    accuracy = float(verdict.right)
    return Reward(accuracy_weight * accuracy + format_weight, accuracy, True, verdict.late, verdict.costly)
