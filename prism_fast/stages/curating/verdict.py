"""Is an answer kept? Whole, in parts, readable by the stages, and right by the reward that they train on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from prism_fast.config import CurateConfig
from prism_fast.data.fields import Fields
from prism_fast.data.formats import FORMATS
from prism_fast.records import DataError, Sample
from prism_fast.reward import Parts, reward_of
from prism_fast.stages.curating.answer import Answer
from prism_fast.stages.curating.split import split

RIGHT = "right"
CUT = {"length", "max_tokens"}
REFUSED = {"content_filter", "refusal"}
_CONTROL = re.compile(r"<\|\w{1,40}\|>")


class Verdict(NamedTuple):
    """``reason`` is RIGHT, or why the answer is rejected."""

    reason: str
    parts: Parts | None = None
    mended: str = ""


def verdict_of(answer: Answer, sample: Sample, config: CurateConfig) -> Verdict:
    """May be called from any thread. Raises DataError for a fault of a user's reward function."""
    if answer.finish in CUT:
        return Verdict("cut at the limit of tokens")
    if answer.finish in REFUSED:
        return Verdict("refused")
    if not answer.text.strip():
        return Verdict("empty")
    parts, how = split(answer.text)
    if parts is None:
        return Verdict(f"format: {how}")
    if _CONTROL.search(answer.text) or not _reads_back(sample, parts):
        return Verdict("holds what stands for images or control tokens")
    reward = reward_of(parts.caption + parts.reasoning, sample, config.reward)
    if reward.late or reward.costly:
        return Verdict("no verdict of the judge")
    if reward.accuracy < config.min_accuracy:
        return Verdict("wrong answer")
    return Verdict(RIGHT, parts, how)


def _reads_back(sample: Sample, parts: Parts) -> bool:
    """Whether the record as a demonstration is one that readers take."""
    turns = [{"role": turn.role, "content": turn.content} for turn in sample.messages]
    turns.append({"role": "assistant", "content": parts.caption + parts.reasoning})
    images = [b"an image"] * len(sample.images)
    try:
        FORMATS["sft"](Fields({"messages": turns, "images": images}, sample.place, Path(), None))
    except DataError:
        return False
    return True
