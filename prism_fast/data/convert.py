"""From one of the formats, in any container, to another: `prism-fast data convert`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from prism_fast.data.bad_records import BadRecords
from prism_fast.data.cache import Cache
from prism_fast.data.dataset import Records
from prism_fast.data.formats import FORMATS, require_parts
from prism_fast.data.held import Held
from prism_fast.data.images import real_folder, real_path
from prism_fast.data.kinds import opened
from prism_fast.data.parquet import GROUP_BYTES
from prism_fast.data.writers import CONTAINERS, refuse_lacking, write_as
from prism_fast.files import try_new
from prism_fast.records import DataError, Sample

KINDS = (*FORMATS, "llava")
Progress = Callable[[int, int], None]  # is told how many of how many records are read
_SHARD = re.compile(r"train-\d{5}-of-\d{5}\.parquet")


class Converted(NamedTuple):
    """What was written."""

    kind: str
    records: int
    left_out: int
    not_written: frozenset[str] = frozenset()  # fields of the inputs that hold something and are not in ``out``
    images_elsewhere: Path | None = None  # the folder that holds images of ``out`` that lie outside of its own


def convert(
    paths: Sequence[Path],
    out: Path,
    kind: str | None = None,
    *,
    skip_bad: int = 0,
    columns: Mapping[str, str] | None = None,
    image_folders: Sequence[Path] = (),
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Converted:
    """Writes the good records of files, folders and patterns, each of any format, as ``kind``, one of KINDS (None: as
    the first file is), to ``out``; an earlier one is replaced.

    Records go through one by one, and ``out`` appears whole or not at all. A demonstration gives a teacher's parts and
    a teacher's parts a demonstration; a record that lacks what the format holds is a bad one, and more than
    ``skip_bad`` of those are a DataError that names the first.
    """
    held, bad, written = Held(GROUP_BYTES), BadRecords(skip_bad), 0
    lost: set[str] = set()
    kept = Cache(cache)
    inputs = [opened(path, columns, image_folders, held, kept) for path in paths]
    target = kind or inputs[0][1]
    elsewhere = _Elsewhere(out)
    total = sum(len(records) for records, _ in inputs)

    def samples() -> Iterator[Sample]:
        nonlocal written
        done = 0
        for records, _ in inputs:
            for number, sample in _good(records, bad):
                if progress is not None:
                    progress(done + number, total)
                try:
                    made = _as(target, sample)
                except DataError as error:
                    bad.add(sample.place, error)
                    continue
                lost.update(_lost(target, sample))
                elsewhere.add(sample)
                yield made
                written += 1
            done += len(records)
        if not written:
            raise DataError(f"{paths[0]}: no valid record is left, {total} are bad ({bad.messages[-1]})")

    write_as(target, out, samples())
    lost.update(*(records.unread for records, _ in inputs))
    return Converted(target, written, len(bad), frozenset(lost), elsewhere.folder)


class _Elsewhere:
    """The folder that holds all images that ``out`` names and that do not lie in its own folder."""

    def __init__(self, out: Path):
        self._own = real_folder(out.absolute().parent) if out.suffix else None
        self.folder: Path | None = None

    def add(self, sample: Sample) -> None:
        for ref in sample.images if self._own is not None else ():  # a folder's shards hold their images
            if ref.path is not None and not (lies := real_path(ref.path).parent).is_relative_to(self._own):
                self.folder = Path(os.path.commonpath([self.folder or lies, lies]))


def _good(records: Records, bad: BadRecords) -> Iterator[tuple[int, Sample]]:
    for number in range(len(records)):
        try:
            sample = records[number]
        except DataError as error:
            bad.add(records.place(number), error)
            continue
        yield number, sample


_TEACHER, _GOLD = {"sft", "llava", "warm-up", "alignment"}, {"alignment", "rlvr"}
_HELD_BY = {  # by field of a sample: what files call it, and the formats that hold it
    "teacher_caption": ("teacher_caption", _TEACHER),
    "teacher_reasoning": ("teacher_cot", _TEACHER),
    "student_caption": ("student_caption", {"warm-up"}),
    "student_reasoning": ("student_cot", {"warm-up"}),
    "gold": ("reward_model.ground_truth", _GOLD),
    "equivalents": ("reward_model.equivalent_answers", _GOLD),
    "data_source": ("data_source", _GOLD),
    "question_type": ("extra_info.question_type", _GOLD),
    "pass_rate": ("extra_info.pass_rate", _GOLD),
}


def _lost(kind: str, sample: Sample) -> Iterator[str]:
    """What was read of a record, and has no place in this format."""
    for name, (field, kinds) in _HELD_BY.items():
        value = getattr(sample, name)
        given = value not in ("all", sample.data_source) if name == "question_type" else value not in (None, "", ())
        if given and kind not in kinds:
            yield field


def refuse_out(out: Path, overwrite: bool) -> None:
    """Raises DataError where ``out`` cannot be what a conversion writes, before it reads anything: it is there, and
    ``overwrite`` was not asked for; it is a folder of other things; its name ends in another way."""
    if out.suffix not in ("", *CONTAINERS):
        raise DataError(
            f"{out}: expected a name that ends in {', '.join(CONTAINERS)}, or a folder's; choose another --out"
        )
    if not overwrite or not out.exists():
        try_new(out, "--out, or --overwrite it")
    elif out.is_dir() and (out.suffix or not all(_SHARD.fullmatch(file.name) for file in out.iterdir())):
        raise DataError(f"{out}: a folder that no conversion has made is not overwritten; choose another --out")
    elif out.is_file() and not out.suffix:
        raise DataError(f"{out}: a file, and shards take a folder; choose another --out")


def _as(kind: str, sample: Sample) -> Sample:
    """The sample with what the format needs and another of its fields tells."""
    if kind in ("sft", "llava") and sample.response is None and sample.teacher_caption is not None:
        sample = replace(sample, response=sample.teacher_caption + str(sample.teacher_reasoning))
    if kind in ("alignment", "warm-up") and sample.teacher_caption is None and sample.response is not None:
        parts = require_parts(sample.response, sample.place, "the assistant's turn")
        sample = replace(sample, teacher_caption=parts.caption, teacher_reasoning=parts.reasoning)
    refuse_lacking(kind, sample)
    return sample
