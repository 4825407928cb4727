"""A policy's responses to the prompts of a file, a block of records at a time.

Records are read when their block is due, so that the pixels of one block are held. What a block gave is appended to
OUT.partial before the next begins: an interrupted command that is started again goes on behind it, to the same bits,
as a block's records and random numbers are its own. The file goes when OUT is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

from prism_fast.config import EvaluateConfig, FilterConfig, PairsConfig, Sampling
from prism_fast.data.encode import Held
from prism_fast.data.formats import Dataset
from prism_fast.models.load import open_policy
from prism_fast.records import DataError
from prism_fast.stages.kept_answers import append, begun_by, blocks_of, partial_file
from prism_fast.steps.sampler import open_sampler
from prism_fast.steps.update import Backprop

BLOCK = 1024  # responses

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
    file, begun = partial_file(config.out), begun_by(config)
    blocks = blocks_of(file, begun, config, data)
    found = [Answered(*each) for block in blocks for each in block["records"]]
    size = _block(sampling)
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
                append(file, None if number else begun, {"records": made, "bad": data.bad.state()})
                found += made
    if not found:
        raise DataError(f"{config.data.files[0]}: each of {len(picked)} records is bad ({data.bad.messages[-1]})")
    return found


def is_answered(config: PairsConfig, data: Dataset, sampling: Sampling, picked: Sequence[int]) -> bool:
    """Whether `answers` would find them all; writes nothing. Raises DataError as it does."""
    file = partial_file(config.out)
    if not file.exists() or not file.read_bytes().endswith(b"\n"):
        return False
    return len(blocks_of(file, begun_by(config), config, data)) == -(-len(picked) // _block(sampling))


def _block(sampling: Sampling) -> int:
    """Records of a block."""
    return max(1, BLOCK // sampling.samples)


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
