"""Data that a stage needs from a policy: warm-up pairs (before 2b), and prompts kept by pass rate (before 3)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from prism_fast.config import FilterConfig, PairsConfig
from prism_fast.data.encode import Held
from prism_fast.data.formats import Dataset, read_align, read_rlvr, write_rlvr, write_warmup
from prism_fast.files import try_new, writing
from prism_fast.models.load import open_policy
from prism_fast.records import DataError, Rollout, Sample
from prism_fast.reward import split_parts, verifiable_reward
from prism_fast.steps.sampler import open_sampler
from prism_fast.steps.update import Backprop

Progress = Callable[[int, int], None]  # (responses done, responses in total)
Say = Callable[[str], None]  # told of every bad record that was passed over


def pairs(config: PairsConfig, progress: Progress | None = None, say: Say | None = None) -> dict[str, int]:
    """Rolls out config.model on the teacher's prompts and writes warm-up records; returns counts.

    A response without a valid format has no parts to compare, and is counted, not written.
    """
    _try_places(config.out)
    data = read_align(config.data.files, **config.data.reading)
    samples, rollout = _roll_out(config, data, progress)
    for line in data.bad.messages if say is not None else ():
        say(f"skipped: {line}")
    records = []
    for text, group in zip(rollout.text, rollout.group.tolist()):
        parts = split_parts(text)
        if parts is not None:
            records.append(replace(samples[group], student_caption=parts.caption, student_reasoning=parts.reasoning))
    if not records:
        raise DataError(f"{config.model.path}: none of {len(rollout)} responses has a valid format; train it longer")
    with writing(config.out):
        write_warmup(config.out, records)
    return {
        "prompts": len(samples),
        "responses": len(rollout),
        "written": len(records),
        "invalid_format": len(rollout) - len(records),
        "skipped_records": len(data.bad),
    }


def filter_prompts(config: FilterConfig, progress: Progress | None = None, say: Say | None = None) -> dict[str, int]:
    """Keeps the prompts whose pass rate over ``samples`` rollouts lies in [low, high]; returns counts."""
    _try_places(config.out)
    data = read_rlvr(config.data.files, **config.data.reading)
    samples, rollout = _roll_out(config, data, progress)
    for line in data.bad.messages if say is not None else ():
        say(f"skipped: {line}")
    right = [0.0] * len(samples)
    for text, group in zip(rollout.text, rollout.group.tolist()):
        sample = samples[group]
        right[group] += verifiable_reward(text, sample.gold, equivalents=sample.equivalents).accuracy
    rate = [count / config.samples for count in right]  # as exact as the bounds: 8 / 10 is 0.8, which in fp32 it is not
    kept = [s for s, r in zip(samples, rate) if config.low <= r <= config.high]
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
    return counts


def _try_places(out: Path) -> None:
    """Raises DataError where the records, or the folder of images beside them, could not be written."""
    try_new(out)
    images = out.with_name(f"{out.stem}_images")
    if images.exists() and not images.is_dir():
        raise DataError(f"{images}: is a file, and a folder for images goes there; choose another out, or remove it")


def _roll_out(
    config: PairsConfig | FilterConfig, data: Dataset, progress: Progress | None
) -> tuple[list[Sample], Rollout]:
    policy, chat = open_policy(config.model)
    picked = list(range(min(len(data), config.limit or len(data))))
    prompts = Held(data, picked, partial(chat.encode_prompt, max_tokens=config.data.max_prompt_tokens))
    if not prompts:
        raise DataError(f"{config.data.files[0]}: each of {len(picked)} records is bad ({data.bad.messages[0]})")
    total = len(prompts) * config.samples
    with closing(open_sampler(config.sampler, Backprop(policy), chat)) as sampler:
        rollout = sampler.generate(
            prompts,
            config,
            seed=config.seed,
            progress=None if progress is None else lambda done: progress(done, total),
        )
    return [data[index] for index in prompts.index], rollout
