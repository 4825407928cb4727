"""What a step trains on: the records that are due, as prompts, and their answers. Each is a draw of `ahead.Ahead`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prism_fast.config import AlignConfig, RLVRConfig
from prism_fast.data.batches import Batches
from prism_fast.data.chat import Chat
from prism_fast.data.encode import lesson, question
from prism_fast.records import Experience, Lesson, Prompt, Rollout, Sample
from prism_fast.steps.experience import Taken, experience, mixed_groups, uniform_prompts
from prism_fast.steps.sampler import Answers
from prism_kernels.group_advantage.rules import RULES

Taught = tuple[list[Lesson], Rollout | None]  # the latter where there are lessons: some record is good


def lesson_encoder(chat: Chat, config: AlignConfig) -> Callable[[Sample], Lesson]:
    """Of the adversarial stage. Where the advantage reads answers, a record without one is bad."""
    needs_gold = RULES[config.advantage.rule].reads_accuracy
    limit = config.data.max_prompt_tokens
    return partial(lesson, chat=chat, max_prompt_tokens=limit, config=config, needs_gold=needs_gold)


def question_encoder(chat: Chat, config: RLVRConfig) -> Callable[[Sample], tuple[Sample, Prompt]]:
    return partial(question, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens)


def draw_lessons(
    sampler: Answers, batches: Batches[Lesson], config: AlignConfig
) -> Callable[[int, Taught | None], Taught]:
    """Of the adversarial stage."""

    def draw(step: int, before: Taught | None) -> Taught:
        number = config.rollout.prompts_per_step
        lessons = batches.take(step * number, number)
        prompts, seed = [item.prompt for item in lessons], config.run.seed * 1_000_003 + step
        return lessons, sampler.generate(prompts, config.rollout, seed=seed) if lessons else None

    return draw


def draw_experience(
    sampler: Answers, batches: Batches[tuple[Sample, Prompt]], config: RLVRConfig, position: int
) -> Callable[[int, Taken | None], Taken]:
    """Of verifiable rewards. ``position``: of the first record, where there is no batch before; it goes on where that
    ended."""
    dapo = config.dynamic_sampling
    take = uniform_prompts if dapo is None else partial(mixed_groups, config=dapo)

    def some(step: int, start: int, number: int, attempt: int) -> Experience | None:
        seed = (config.run.seed * 1_000_003 + step) * 101 + attempt
        questions = batches.take(start, number)
        return experience(sampler, questions, config.rollout, config, seed=seed) if questions else None

    def draw(step: int, before: Taken | None) -> Taken:
        start = position if before is None else before[1]
        return take(partial(some, step), start, config.rollout.prompts_per_step)

    return draw
