"""From one of the formats, in any container, to another: `prism-fast data convert`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from prism_fast.data.formats import FORMATS, Dataset, require_parts
from prism_fast.data.writers import write_as
from prism_fast.records import Sample

KINDS = tuple(FORMATS)
Progress = Callable[[int], None]  # is told how many records are written


def convert(data: Dataset, kind: str, out: Path, progress: Progress | None = None) -> int:
    """Writes every good record of ``data`` as ``kind``, one of KINDS; returns how many.

    A demonstration gives a teacher's parts and a teacher's parts a demonstration; what a record lacks is an error, a
    DataError that names it, and nothing is written.
    """

    def records() -> Iterator[Sample]:
        for number, sample in enumerate(data):
            if progress is not None:
                progress(number)
            yield _as(kind, sample)

    write_as(kind, out, records())
    return len(data)


def _as(kind: str, sample: Sample) -> Sample:
    """The sample with what the format needs and another of its fields tells."""
    if kind == "sft" and sample.response is None and sample.teacher_caption is not None:
        return replace(sample, response=sample.teacher_caption + str(sample.teacher_reasoning))
    if kind in ("alignment", "warm-up") and sample.teacher_caption is None and sample.response is not None:
        parts = require_parts(sample.response, sample.place, "the assistant's turn")
        return replace(sample, teacher_caption=parts.caption, teacher_reasoning=parts.reasoning)
    return sample
