"""Data that a stage needs from a policy: warm-up pairs (before 2b), and prompts kept by pass rate (before 3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from prism_fast.config import FilterConfig, PairsConfig
from prism_fast.data.formats import Dataset, read_align, read_rlvr, write_rlvr, write_warmup
from prism_fast.data.hard_negatives import HardNegatives
from prism_fast.data.unread import not_written
from prism_fast.files import try_new, writing
from prism_fast.records import DataError, Sample
from prism_fast.reward import split_parts, verifiable_reward
from prism_fast.stages.answers import Progress, Say, answers
from prism_fast.stages.kept_answers import partial_file


def pairs(config: PairsConfig, progress: Progress | None = None, say: Say | None = None) -> dict[str, int]:
    """Rolls out config.model on the teacher's prompts and writes warm-up records; returns counts.

    A response without a valid format has no parts to compare, and is counted, not written.
    """
    _try_places(config.out)
    data = read_align(config.data.files, **config.data.reading)
    answered = answers(config, data, config, picked=_picked(config, data), progress=progress, say=say or print)
    _say_skipped(data, say)
    records, responses = [], 0
    for index, texts, _ in answered:
        responses += len(texts)
        for parts in filter(None, map(split_parts, texts)):
            records.append(replace(data[index], student_caption=parts.caption, student_reasoning=parts.reasoning))
    if not records:
        raise DataError(f"{config.model.path}: none of {responses} responses has a valid format; train it longer")
    hard = _hard_negatives(config, data, len(records))
    with writing(config.out):
        write_warmup(config.out, _mixed(records, hard))
    partial_file(config.out).unlink(missing_ok=True)
    return {
        "prompts": len(answered),
        "responses": responses,
        "written": len(records) + len(hard),
        **({"hard_negatives": len(hard)} if config.hard_negatives.share else {}),
        "invalid_format": responses - len(records),
        "skipped_records": len(data.bad),
    }


def _hard_negatives(config: PairsConfig, data: Dataset, soft: int) -> list[Sample]:
    """As many as make up their share beside ``soft`` other records, of all teacher's texts in turn."""
    share, found = config.hard_negatives.share, []
    wanted = round(soft * share / (1 - share))
    for index in range(len(data)) if wanted else ():
        try:
            found.append((index, (cast(str, data[index].teacher_caption), cast(str, data[index].teacher_reasoning))))
        except DataError as error:
            data.skip(index, error)
    made = HardNegatives([texts for _, texts in found], config.hard_negatives, config.seed).several(wanted)
    if len(made) < wanted:
        raise DataError(
            f"{config.data.files[0]}: {len(made)} hard negatives can be made, hard_negatives.share = {share:g} wants "
            f"{wanted} beside {soft} other records; lower it, or name more hard_negatives.kinds"
        )
    negatives = [(data[found[place][0]], negative) for place, negative in made]
    return [replace(s, student_caption=n.caption, student_reasoning=n.reasoning) for s, n in negatives]


def _mixed(soft: list[Sample], hard: list[Sample]) -> list[Sample]:
    """Both kinds evenly, as the last records are those that the warm-up holds out."""
    placed = [((i + 0.5) / len(kind), sample) for kind in (soft, hard) for i, sample in enumerate(kind)]
    return [sample for _, sample in sorted(placed, key=lambda item: item[0])]


def filter_prompts(config: FilterConfig, progress: Progress | None = None, say: Say | None = None) -> dict[str, int]:
    """Keeps the prompts whose pass rate over ``samples`` rollouts lies in [low, high]; returns counts."""
    _try_places(config.out)
    data = read_rlvr(config.data.files, **config.data.reading)
    answered = answers(config, data, config, picked=_picked(config, data), progress=progress, say=say or print)
    _say_skipped(data, say)
    samples = [data[index] for index, _, _ in answered]
    right = [
        sum(verifiable_reward(text, sample.gold, equivalents=sample.equivalents).accuracy for text in texts)
        for sample, (_, texts, _) in zip(samples, answered)
    ]
    rate = [count / config.samples for count in right]  # as exact as the bounds: 8 / 10 is 0.8, which in fp32 it is not
    kept = [replace(s, pass_rate=r) for s, r in zip(samples, rate) if config.low <= r <= config.high]
    counts = {
        "prompts": len(samples),
        "kept": len(kept[: config.keep]),
        "too_hard": sum(r < config.low for r in rate),
        "too_easy": sum(r > config.high for r in rate),
        "skipped_records": len(data.bad),
    }
    if not kept:
        raise DataError(
            f"{config.data.files[0]}: no prompt of {len(samples)} has a pass rate in [{config.low}, {config.high}] "
            f"({counts['too_hard']} below, {counts['too_easy']} above); widen low and high"
        )
    with writing(config.out):
        write_rlvr(config.out, kept[: config.keep])
    if data.unread and say is not None:
        say(not_written(data.unread))
    partial_file(config.out).unlink(missing_ok=True)
    return counts


def _try_places(out: Path) -> None:
    """Raises DataError where the records, or the folder of images beside them, could not be written."""
    try_new(out)
    images = out.with_name(f"{out.stem}_images")
    if images.exists() and not images.is_dir():
        raise DataError(f"{images}: is a file, and a folder for images goes there; choose another out, or remove it")


def _picked(config: PairsConfig | FilterConfig, data: Dataset) -> range:
    return range(min(len(data), config.limit or len(data)))


def _say_skipped(data: Dataset, say: Say | None) -> None:
    for line in data.bad.messages if say is not None else ():
        say(f"skipped: {line}")
