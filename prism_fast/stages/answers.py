"""A policy's responses to the prompts of a file, a block of records at a time.

Records are read when their block is due, so that the pixels of one block are held. What a block gave is appended to
OUT.partial before the next begins: an interrupted command that is started again goes on behind it, to the same bits,
as a block's records and random numbers are its own. The file goes when OUT is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prism_fast.config import EvaluateConfig, FilterConfig, PairsConfig, Sampling
from prism_fast.data.encode import Held
from prism_fast.data.formats import Dataset
from prism_fast.files import writing
from prism_fast.models.load import open_policy
from prism_fast.records import DataError
from prism_fast.run import record
from prism_fast.steps.sampler import open_sampler
from prism_fast.steps.update import Backprop

BLOCK = 1024  # responses
FIRST = b'{"stage": '  # what OUT.partial begins with
AFTER = ("out", "low", "high", "keep", "reward", "hard_negatives")  # settings that responses do not depend on

Progress = Callable[[int, int], None]  # (responses done, responses in total)
Say = Callable[[str], None]


class Answered(NamedTuple):
    index: int  # of the record
    texts: list[str]
    lengths: list[int]  # tokens of each


def answers(
    config: PairsConfig | FilterConfig | EvaluateConfig,
    data: Dataset,
    sampling: Sampling,
    *,
    picked: Sequence[int],
    limit: int | None = None,
    progress: Progress | None = None,
    say: Say = print,
) -> list[Answered]:
    """Responses to the good records among ``picked``, to the first ``limit`` of them. Raises DataError where there are
    none, or where OUT.partial is of other settings or data."""
    file, begun = partial_file(config.out), _record(config)
    blocks = _kept(file, begun, config, data)
    found = [Answered(*each) for block in blocks for each in block["records"]]
    size = max(1, BLOCK // sampling.samples)
    total = min(len(picked), limit or len(picked)) * sampling.samples
    numbers = range(len(blocks), -(-len(picked) // size))
    if blocks:
        say(f"{file}: goes on after {len(found)} records that are answered there")
    if numbers and len(found) != limit:
        policy, chat = open_policy(config.model)
        encode = partial(chat.encode_prompt, max_tokens=config.data.max_prompt_tokens)
        with closing(open_sampler(config.sampler, Backprop(policy), chat, say=say)) as sampler:
            for number in numbers:
                left = None if limit is None else limit - len(found)
                if left == 0:
                    break
                prompts = Held(data, picked[number * size : (number + 1) * size], encode, left)
                made = _ask(sampler, prompts, sampling, config.seed * 1_000_003 + number, progress, (len(found), total))
                _append(file, None if number else begun, {"records": made, "bad": data.bad.state()})
                found += made
    if not found:
        raise DataError(f"{config.data.files[0]}: each of {len(picked)} records is bad ({data.bad.messages[-1]})")
    return found


def partial_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _ask(sampler, prompts: Held, sampling: Sampling, seed: int, progress: Progress | None, so_far: tuple[int, int]):
    if not prompts:
        return []
    records, total = so_far
    done = records * sampling.samples
    told = None if progress is None else lambda n: progress(done + n, total)
    rollout = sampler.generate(prompts, sampling, seed=seed, progress=told)
    made = [Answered(index, [], []) for index in prompts.index]
    for text, ids, group in zip(rollout.text, rollout.response_ids, rollout.group.tolist()):
        made[group].texts.append(text)
        made[group].lengths.append(len(ids))
    return made


def _record(config: Any) -> dict[str, Any]:
    made = record.record(type(config).__name__, config)
    return {**made, "config": {key: value for key, value in made["config"].items() if key not in AFTER}}


def _append(file: Path, begun: dict[str, Any] | None, block: dict[str, Any]) -> None:
    lines = [json.dumps(each) for each in (begun, block) if each is not None]
    with writing(file), open(file, "w" if begun else "a", encoding="utf-8") as journal:
        journal.write("".join(f"{line}\n" for line in lines))
        journal.flush()
        os.fsync(journal.fileno())


def _kept(file: Path, begun: dict[str, Any], config: Any, data: Dataset) -> list[dict[str, Any]]:
    """The blocks of an interrupted command; what was being written when it ended is cut off."""
    if not file.exists():
        return []
    with writing(file):
        *lines, torn = file.read_bytes().split(b"\n")
    if not lines and torn[: len(FIRST)] == FIRST[: len(torn)]:
        return []  # it ended before a block was there
    try:
        before, *blocks = map(json.loads, lines)
        changed = record.changes(before, begun, config)
        data.bad.load(blocks[-1]["bad"] if blocks else {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a command's kept responses ({error}); remove it") from None
    if changed and blocks:
        raise DataError(f"{file}: was begun with other settings: {'; '.join(changed)}; set them back, or remove it")
    if torn:
        with writing(file):
            os.truncate(file, file.stat().st_size - len(torn))
    return [] if changed else blocks
