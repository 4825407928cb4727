"""Texts -> a discriminator's scores, as a step of alignment makes them: questions of several people in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from prism_fast.config import ServeConfig
from prism_fast.data.chat import Chat
from prism_fast.data.encode import lesson
from prism_fast.models.discriminator import Discriminator
from prism_fast.pack import pack
from prism_fast.records import DataError, Prompt, Sample, Scores
from prism_fast.steps.advantage import alignment_advantage, clamped_scores, response_reward
from prism_fast.steps.discriminator_step import Parts, parts_of
from prism_fast.steps.pair_loss import length_corrected
from prism_fast.steps.parts import STUDENT_KINDS, PartTrees


class Question(NamedTuple):
    """A prompt, the parts of N responses to it (None: invalid format), and those of the teacher's where it is known."""

    prompt: Prompt
    responses: list[Parts | None]
    teacher: Parts | None

    @property
    def tokens(self) -> int:
        """In a pass of its own."""
        pairs = [pair for pair in (*self.responses, self.teacher) if pair is not None]
        return len(self.prompt) + sum(len(part) for pair in pairs for part in pair)


class Verdict(NamedTuple):
    """Of one question, N numbers each.

    >>> Verdict(perception=[0.5, None], reasoning=[12.0, None], clamped=[[0.5, 10.0], None], reward=[5.25, -11.5],
    ...         advantage=[0.7, -2.2], teacher=None)
    """

    perception: list[float | None]  # None where the format is invalid
    reasoning: list[float | None]
    clamped: list[list[float] | None]  # both sides, as the advantage reads them
    reward: list[float]  # `response_reward`
    advantage: list[float]  # `alignment_advantage` of these N as a group
    teacher: list[float] | None  # its two scores


def question(sample: Sample, responses: Sequence[str], chat: Chat, config: ServeConfig) -> Question:
    """Raises DataError, naming ``sample.place``, for a prompt or a teacher that is not taken, or a part that fits no
    pass. A response that holds the name of a control token is invalid, as one that was sampled with it."""
    control = [chat.token_bytes[i].decode() for i in chat.forbidden_ids if chat.token_bytes[i]]
    if sample.teacher_caption is None:
        prompt, teacher = chat.encode_prompt(sample, config.max_prompt_tokens), None
    else:
        made = lesson(sample, chat, max_prompt_tokens=config.max_prompt_tokens, config=config)
        prompt, teacher = made.prompt, made.teacher
    pairs: list[Parts | None] = []
    for text in responses:
        found = None if any(name in text for name in control) else parts_of(text, chat, config)
        pairs.append(None if found is None else (torch.tensor(found[0]), torch.tensor(found[1])))
    longest = max((len(part) for pair in (*pairs, teacher) if pair is not None for part in pair), default=0)
    if len(prompt) + longest > config.tokens_per_pack:
        raise DataError(
            f"{sample.place}: a prompt of {len(prompt)} tokens and a part of {longest} are over tokens_per_pack = "
            f"{config.tokens_per_pack}; raise it, or shorten them"
        )
    return Question(prompt, pairs, teacher)


@torch.no_grad()
def verdicts(discriminator: Discriminator, questions: Sequence[Question], config: ServeConfig) -> list[Verdict]:
    """One for each question; equal prompts are one root, and their equal parts stand once."""
    roots = {item.prompt.key: item.prompt for item in questions if any((*item.responses, item.teacher))}
    number = {key: i for i, key in enumerate(roots)}
    trees = PartTrees(list(roots.values()))
    labels = [
        # A score does not depend on who speaks, so a teacher's parts are parts as others are: in no pack by themselves.
        [
            None if pair is None else trees.add(number[item.prompt.key], pair, STUDENT_KINDS)
            for pair in (item.teacher, *item.responses)
        ]
        for item in questions
    ]
    score_of_part = torch.zeros(len(trees))
    if len(trees):
        packs = pack(trees.trees(), config.tokens_per_pack, discriminator.image)
        for index in range(len(packs)):
            on_device = packs[index].to(discriminator.device)
            score = discriminator(on_device, text_positions=config.compat.text_positions).score
            corrected = length_corrected(score, on_device.sequence_start.diff(), config.length_correction)
            score_of_part[packs.labels(index)] = corrected.float().cpu()
    return [_verdict(score_of_part, own, config) for own in labels]


def _verdict(score_of_part: torch.Tensor, labels: list[list[int] | None], config: ServeConfig) -> Verdict:
    """``labels``: of the teacher's parts, whose scores are 0 where there are none, then of the responses'."""
    there = torch.tensor([pair is not None for pair in labels])
    rows = torch.tensor([pair or [0, 0] for pair in labels]).T
    score = score_of_part[rows].where(there, 0.0) if there.any() else torch.zeros(rows.shape)
    valid = there[1:]
    scores = Scores(score[0, 1:], score[1, 1:], score[0, :1], score[1, :1], valid)
    group = torch.zeros(len(valid), dtype=torch.int64)

    def where_valid(values: torch.Tensor) -> list[Any]:
        return [value if ok else None for value, ok in zip(values.tolist(), valid.tolist())]

    return Verdict(
        where_valid(scores.perception),
        where_valid(scores.reasoning),
        where_valid(torch.stack(clamped_scores(scores, group, config), dim=1)),
        response_reward(scores, group, config.advantage, config).tolist(),
        alignment_advantage(scores, group, config.advantage, config).tolist(),
        None if labels[0] is None else score[:, 0].tolist(),
    )
