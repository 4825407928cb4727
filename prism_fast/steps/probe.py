"""Does a discriminator know content? Its scores beside what is right, apart from form and length.

Scores of different prompts do not compare, so everything here is within groups (responses to one prompt).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast.records import Rollout, Sample, Scores
from prism_fast.response_format import Parts, count_caption_items, count_reasoning_steps, split_parts
from prism_fast.reward import is_right

WITHIN = ("", "_form", "_form_length")
NEAR = 1.1  # the longer over the shorter of two parts that count as equally long
PIECES = re.compile(r"[\n;]|[.!?](?=\s|$)")
BULLET = re.compile(r"[ \t]*[-*•][ \t]+")


class Side(NamedTuple):
    """What is known of one part (captions, or reasonings) of B valid responses.

    >>> Side(score=torch.tensor([2.0, 1.0]), right=torch.tensor([True, False]), form=torch.tensor([4, 4]),
    ...      length=torch.tensor([11, 11]), group=torch.tensor([0, 0]))
    """

    score: Tensor  # (B,) fp32
    right: Tensor  # (B,) bool
    form: Tensor  # (B,) int64: items of a caption, steps of a reasoning
    length: Tensor  # (B,) int64, tokens
    group: Tensor  # (B,) int64


def content_figures(side: Side) -> dict[str, float]:
    """Pairs of a right and a wrong part, and how often the right one scores higher (equal scores: one half), as AUC:

    - ``auc``: of all pairs of a group; ``auc_form``: of equal form; ``auc_form_length``: and of nearly equal length;
    - ``pairs``, ``pairs_form``, ``pairs_form_length``: of how many;
    - ``rank_right``, ``rank_form``, ``rank_length``: Spearman's rank correlation of the score with each, over ranks
      within groups.

    What has nothing to measure is absent.
    """
    right_of, pairs = dict.fromkeys(WITHIN, 0.0), dict.fromkeys(WITHIN, 0)
    rows = [(side.group == g).nonzero().flatten() for g in side.group.unique()]
    for score, right, form, length, _ in (Side(*(values[of_group] for values in side)) for of_group in rows):
        better = (score[:, None] > score).float() + 0.5 * (score[:, None] == score)
        told = right[:, None] & ~right
        same_form = told & (form[:, None] == form)
        near = torch.maximum(length[:, None], length) <= NEAR * torch.minimum(length[:, None], length)
        for name, chosen in zip(WITHIN, (told, same_form, same_form & near)):
            right_of[name] += float(better[chosen].sum())
            pairs[name] += int(chosen.sum())
    found = {f"pairs{name}": float(count) for name, count in pairs.items()}
    found |= {f"auc{name}": right_of[name] / count for name, count in pairs.items() if count}
    for name in ("right", "form", "length"):
        correlation = rank_correlation(side.score, getattr(side, name).float(), rows)
        found |= {} if correlation is None else {f"rank_{name}": correlation}
    return found


def rank_correlation(one: Tensor, other: Tensor, rows: Sequence[Tensor]) -> float | None:
    """Spearman's correlation over ranks within groups, (B,) each; None where one of them is constant in every group."""
    a, b = (torch.cat([_centred_ranks(values[of_group]) for of_group in rows]) for values in (one, other))
    scale = a.square().sum() * b.square().sum()
    return float((a * b).sum() / scale.sqrt()) if scale > 0 else None


def _centred_ranks(values: Tensor) -> Tensor:
    """(n,) fp64: ranks, ties sharing theirs, less their mean."""
    ranks = ((values[:, None] > values).double() + 0.5 * (values[:, None] == values)).sum(1)
    return ranks - ranks.mean()


def sides(rollout: Rollout, scores: Scores, parts: Sequence, right: Sequence[Tensor]) -> dict[str, Side]:
    """By name, of the valid responses alone; ``right``: (B,) bool of the captions, of the reasonings."""
    valid = scores.format_valid.nonzero().flatten()
    rows: list[int] = valid.tolist()
    forms = [[count(rollout.text[i]) for i in rows] for count in (count_caption_items, count_reasoning_steps)]
    return {
        name: Side(
            getattr(scores, name)[valid],
            right[number][valid].bool(),
            torch.tensor(forms[number], dtype=torch.int64),
            torch.tensor([len(parts[i][number]) for i in rows], dtype=torch.int64),
            rollout.group[valid],
        )
        for number, name in enumerate(names.SIDES)
    }


def content_metrics(rollout: Rollout, scores: Scores, parts: Sequence, accuracy: Tensor | None) -> dict[str, float]:
    """Of a step of alignment, with right answers in the place of right parts: `metric_names.CONTENT`, `STYLE`."""
    if accuracy is None or not scores.format_valid.any():
        return {}
    metrics: dict[str, float] = {}
    for name, side in sides(rollout, scores, parts, (accuracy > 0, accuracy > 0)).items():
        figures = content_figures(side)
        ranks = [abs(figures[rank]) for rank in ("rank_form", "rank_length") if rank in figures]
        metrics |= {names.CONTENT[name]: figures["auc_form"]} if "auc_form" in figures else {}
        metrics |= {names.STYLE[name]: max(ranks)} if ranks else {}
    return metrics


def right_parts(text: str, sample: Sample, by_teacher: bool) -> tuple[bool, bool]:
    """(caption, reasoning) of a response: whether each is right.

    By the answer alone, or by a teacher that is right: a caption whose items are the teacher's first ones, as many as
    it names, and an answer whose steps, where they are as many as the teacher's, are the teacher's.
    """
    found = split_parts(text)
    if found is None or sample.gold is None:
        return False, False
    answered = any(is_right(found.answer, gold) for gold in (sample.gold, *sample.equivalents))
    if not by_teacher:
        return answered, answered
    truth = split_parts(f"{sample.teacher_caption}{sample.teacher_reasoning}")
    if truth is None:
        return False, False
    seen, there = _pieces(found.caption), _pieces(truth.caption)
    steps, all_steps = _pieces(_think(found)), _pieces(_think(truth))
    followed = steps == all_steps if len(steps) == len(all_steps) else True
    return bool(seen) and seen == there[: len(seen)], answered and followed


def _think(parts: Parts) -> str:
    return parts.reasoning.split("</think>")[0]


def _pieces(text: str) -> list[str]:
    plain = re.sub(r"</?\w+>", "\n", text).lower()
    return [" ".join(words) for piece in PIECES.split(plain) if (words := BULLET.sub("", piece, count=1).split())]
