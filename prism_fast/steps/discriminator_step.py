"""The adversarial stage's discriminator step: one forward gives the scores and its own loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.config import AlignConfig
from prism_fast.data.chat import Chat
from prism_fast.models.discriminator import Discriminator
from prism_fast.pack import (
    KIND_STUDENT_CAPTION,
    KIND_STUDENT_REASONING,
    KIND_TEACHER_CAPTION,
    KIND_TEACHER_REASONING,
    Tree,
    pack,
)
from prism_fast.records import DataError, PackedTree, Prompt, Rollout, Sample, Scores
from prism_fast.reward import split_parts
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.pair_loss import PairScores, alignment_loss, length_corrected

TEACHER_KINDS = (KIND_TEACHER_CAPTION, KIND_TEACHER_REASONING)

STUDENT_KINDS = (KIND_STUDENT_CAPTION, KIND_STUDENT_REASONING)

SIDES = ("perception", "reasoning")


@dataclass(frozen=True)
class Lesson:
    """One prompt with its teacher's parts, encoded."""

    sample: Sample
    prompt: Prompt
    teacher: tuple[Tensor, Tensor]  # tokens of the caption, of the reasoning


def lesson(sample: Sample, chat: Chat, config: AlignConfig) -> Lesson:
    """Tokens of a prompt and its teacher's parts. A teacher that does not fit is an error, never cut in silence."""
    prompt = chat.encode_prompt(sample, config.data.max_prompt_tokens)
    teacher = []
    for name, text in (("teacher_caption", sample.teacher_caption), ("teacher_cot", sample.teacher_reasoning)):
        ids = chat.encode_part(text)
        if config.compat.teacher_token_limit is not None:
            ids = ids[: config.compat.teacher_token_limit]
        if len(ids) > config.max_part_tokens:
            raise DataError(
                f"{sample.place}: {name}: {len(ids)} tokens, max_part_tokens is {config.max_part_tokens}; raise it"
            )
        teacher.append(ids)
    return Lesson(sample, prompt, tuple(teacher))


def student_parts(rollout: Rollout, chat: Chat, config: AlignConfig) -> list[tuple[Tensor, Tensor] | None]:
    """Tokens of every response's caption and reasoning, each tokenised on its own; None where the format is invalid.

    A part that is over max_part_tokens once re-tokenised, or a response that holds a placeholder token, is invalid too.
    """
    parts: list[tuple[Tensor, Tensor] | None] = []
    for text, ids in zip(rollout.text, rollout.response_ids):
        found = split_parts(text, config.compat.format)
        if found is None or chat.holds_forbidden(ids.tolist()):
            parts.append(None)
            continue
        pair = (chat.encode_part(found.caption), chat.encode_part(found.reasoning))
        parts.append(None if max(len(p) for p in pair) > config.max_part_tokens else pair)
    return parts


def discriminator_trees(
    lessons: list[Lesson], rollout: Rollout, parts: list[tuple[Tensor, Tensor] | None]
) -> tuple[list[Tree], list[tuple[int, int] | None]]:
    """Prompt -> teacher's caption and reasoning, then those of its valid responses; equal parts stand once.

    Also returns, for every response, the branches of its caption and reasoning in the tree of its group.
    """
    branches = [list(item.teacher) for item in lessons]
    kinds = [list(TEACHER_KINDS) for _ in lessons]
    known: dict[tuple, int] = {}
    where: list[tuple[int, int] | None] = []
    for part, group in zip(parts, rollout.group.tolist()):
        if part is None:
            where.append(None)
            continue
        pair = []
        for ids, kind in zip(part, STUDENT_KINDS):
            key = (group, kind, tuple(ids.tolist()))
            if key not in known:
                known[key] = len(branches[group])
                branches[group].append(ids)
                kinds[group].append(kind)
            pair.append(known[key])
        where.append((pair[0], pair[1]))
    trees = [Tree(item.prompt, b, k, together=(0, 1)) for item, b, k in zip(lessons, branches, kinds)]
    return trees, where


def discriminator_gradient(
    discriminator: Discriminator,
    lessons: list[Lesson],
    rollout: Rollout,
    parts: list[tuple[Tensor, Tensor] | None],
    config: AlignConfig,
    load: ExpertLoad,
) -> tuple[Scores, dict[str, float], int]:
    """One forward and backward over all parts: (scores, metrics, tokens). Its weights are those before the update."""
    trees, where = discriminator_trees(lessons, rollout, parts)
    packs = pack(trees, config.run.tokens_per_pack, discriminator.image)
    valid_total = sum(pair is not None for pair in where)
    members: list[list[int]] = [[] for _ in lessons]
    for i, group in enumerate(rollout.group.tolist()):
        members[group].append(i)
    student = torch.zeros(2, len(rollout))
    teacher = torch.zeros(2, len(lessons))
    counted: set[int] = set()  # trees whose teacher squares an earlier pack has counted
    loss = 0.0
    for packed in packs:
        packed = packed.to(discriminator.head.device)
        judgement = discriminator(packed, text_positions=config.compat.text_positions)
        load.add(judgement.stats)
        score, weights, pairs = judgement.score, [], []
        lengths = packed.sequence_start.diff()
        row = {name: i for i, name in enumerate(packed.branch)}
        for tree in dict.fromkeys(tree for tree, _ in packed.branch):
            weights += [(row[tree, side], 0 if tree in counted else len(members[tree])) for side in range(2)]
            counted.add(tree)
            pairs += [
                (i, side, row[tree, side], row[tree, where[i][side]])
                for i in members[tree]
                if where[i] is not None
                for side in range(2)
                if (tree, where[i][side]) in row
            ]
        raw = score.clamp(-config.score_clamp, config.score_clamp) if config.compat.clamp_in_loss else score
        compared = length_corrected(raw, lengths, config.length_correction)
        pair_scores = _pair_scores(raw, compared, weights, pairs)
        part = alignment_loss(
            pair_scores,
            valid_total=valid_total,
            response_total=len(rollout),
            prompt_total=len(lessons),
            score_penalty=config.score_penalty,
        )
        part.backward()
        loss += float(part.detach())
        _collect(
            length_corrected(score.detach(), lengths, config.length_correction).cpu(), packed, pairs, student, teacher
        )
    valid = torch.tensor([pair is not None for pair in where])
    scores = Scores(student[0], student[1], teacher[0], teacher[1], valid)
    metrics = {"loss/discriminator": loss, **score_metrics(scores, rollout.group)}
    return scores, metrics, sum(p.num_tokens for p in packs)


def _pair_scores(
    raw: Tensor, compared: Tensor, weights: list[tuple[int, int]], pairs: list[tuple[int, int, int, int]]
) -> PairScores:
    """``weights``: (teacher row, responses it counts for); ``pairs``: (response, side, teacher row, student row)."""
    device = raw.device
    teacher = torch.tensor([row for row, _ in weights], dtype=torch.int64, device=device)
    index = torch.tensor([pair[2:] for pair in pairs], dtype=torch.int64, device=device).view(-1, 2)
    return PairScores(
        student=compared.index_select(0, index[:, 1]),
        teacher=compared.index_select(0, index[:, 0]),
        student_raw=raw.index_select(0, index[:, 1]),
        teacher_raw=raw.index_select(0, teacher),
        teacher_weight=torch.tensor([w for _, w in weights], dtype=raw.dtype, device=device),
    )


def _collect(score: Tensor, packed: PackedTree, pairs: list, student: Tensor, teacher: Tensor) -> None:
    """Puts a pack's scores into (2, B) and (2, G)."""
    for i, side, _, student_row in pairs:
        student[side, i] = score[student_row]
    for branch_row, (tree, branch) in enumerate(packed.branch):
        if branch < 2:
            teacher[branch, tree] = score[branch_row]


def score_metrics(scores: Scores, group: Tensor) -> dict[str, float]:
    """Mean scores, and how often the teacher's part beats a valid student's; absent where none is valid."""
    valid = scores.format_valid
    metrics = {
        "score/teacher_perception": float(scores.teacher_perception.mean()),
        "score/teacher_reasoning": float(scores.teacher_reasoning.mean()),
    }
    if valid.any():
        for side in SIDES:
            student, teacher = getattr(scores, side), getattr(scores, f"teacher_{side}")[group]
            metrics[f"score/student_{side}"] = float(student[valid].mean())
            metrics[f"discriminator_accuracy/{side}"] = float((teacher > student)[valid].float().mean())
    return metrics


def not_finite(scores: Scores, rollout: Rollout, lessons: list[Lesson]) -> str | None:
    """Names the first response or teacher whose score, or log-prob, is not finite. Scores are looked at before they
    are clamped, which would make a number of an infinite one."""
    for side in SIDES:
        for i, score in enumerate(getattr(scores, side).tolist()):
            if not math.isfinite(score):
                return f"the {side} score of response {i} ({lessons[int(rollout.group[i])].sample.place}) is not finite"
        for item, score in zip(lessons, getattr(scores, f"teacher_{side}").tolist()):
            if not math.isfinite(score):
                return f"the {side} score of the teacher ({item.sample.place}) is not finite"
    return rollout.fault()
