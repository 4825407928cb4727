"""The files that are made of what was kept, and the report of all that was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from prism_fast.config import CurateConfig
from prism_fast.data.formats import Dataset, write_align, write_sft, write_warmup
from prism_fast.data.images import content
from prism_fast.files import write_json, writing
from prism_fast.records import ImageRef, Sample
from prism_fast.reward import Parts, split_parts
from prism_fast.stages.curating.asking import BAD, FAILED, KEPT, REPEATED, UNASKED, WRONG, Asking, Outcome
from prism_fast.stages.curating.hard import Looked
from prism_fast.stages.curating.journal import Journal
from prism_fast.stages.curating.purse import cost
from prism_fast.stages.curating.split import split

REPORT = "report.json"


class Kept:
    """What was kept, record by record, in the order of the data; texts are read from the journal when they are due."""

    def __init__(self, data: Dataset, journal: Journal, looked: Looked, outcomes: Sequence[Outcome]):
        self._data, self._journal, self._looked = data, journal, looked
        self._kept = [outcome for outcome in outcomes if outcome.right]

    def __len__(self) -> int:
        return len(self._kept)

    def demonstrations(self) -> Iterator[Sample]:
        for outcome in self._kept:
            sample = self._sample(outcome)
            for parts in self._right(outcome):
                yield replace(sample, response=parts.caption + parts.reasoning)

    def lessons(self) -> Iterator[Sample]:
        """Of every prompt the first right answer: alignment has one teacher's response for each."""
        for outcome in self._kept:
            parts = next(self._right(outcome))
            yield replace(self._sample(outcome), teacher_caption=parts.caption, teacher_reasoning=parts.reasoning)

    def pairs(self) -> Iterator[Sample]:
        """The policy's responses of valid format, against the right answers in turn."""
        for outcome in self._kept:
            if outcome.index not in self._looked.answered:
                continue
            sample, right = self._sample(outcome), [*self._right(outcome)]
            students = filter(None, map(split_parts, self._looked.answered[outcome.index].texts))
            for number, student in enumerate(students):
                teacher = right[number % len(right)]
                yield replace(
                    sample,
                    teacher_caption=teacher.caption,
                    teacher_reasoning=teacher.reasoning,
                    student_caption=student.caption,
                    student_reasoning=student.reasoning,
                )

    def _right(self, outcome: Outcome) -> Iterator[Parts]:
        for key in outcome.right:
            yield cast(Parts, split(self._journal.answer(key).text).parts)

    def _sample(self, outcome: Outcome) -> Sample:
        """With its images as bytes, so that the files can be moved."""
        sample = self._data[outcome.index]
        return replace(sample, images=tuple(ImageRef(data=content(ref)) for ref in sample.images))


def write_files(config: CurateConfig, kept: Kept) -> dict[str, int]:
    """{name: records} of the files, in the formats that the stages train on."""
    counts: Counter[str] = Counter()

    def counted(name: str, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            counts[name] += 1
            yield sample

    with writing(config.out):
        write_sft(config.out / "sft.json", counted("sft.json", kept.demonstrations()))
        write_align(config.out / "alignment.parquet", counted("alignment.parquet", kept.lessons()))
        if next(kept.pairs(), None) is not None:
            write_warmup(config.out / "warmup.jsonl", counted("warmup.jsonl", kept.pairs()))
    return dict(counts)


def account(
    config: CurateConfig, looked: Looked, picked: int, asking: Asking, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Every record that was looked at stands under one of ``prompts``, every answer under one of ``answers``."""
    states = Counter(outcome.state for outcome in outcomes)
    journal, teacher = asking.journal, config.teacher
    return {
        "complete": asking.halt.reason is None,
        "stopped": asking.halt.reason,
        "records": picked,
        "prompts": {
            "easy": looked.easy,
            **{state: states[state] for state in (REPEATED, FAILED, WRONG, UNASKED, KEPT)},
            BAD: states[BAD] + picked - looked.easy - len(looked.hard),
        },
        "answers": dict(asking.reasons.most_common()),
        "mended": dict(asking.mended.most_common()),
        "requests": {
            "answered": len(journal),
            "lost": journal.lost,
            "over_bound": asking.over_bound,
            "troubles": dict(asking.teacher.troubles),
        },
        "tokens": {"counted": journal.counted._asdict(), "assumed": journal.assumed._asdict()},
        "cost": {"counted": cost(journal.counted, teacher), "assumed": cost(journal.assumed, teacher)},
        "teacher": {"url": teacher.url, "model": teacher.model},
    }


def write_report(config: CurateConfig, report: dict[str, Any]) -> None:
    write_json(config.out / REPORT, report, indent=1)
