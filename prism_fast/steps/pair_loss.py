"""The discriminator's losses on pairs of scores (PRISM, warm-up and adversarial stage)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(better: Tensor, worse: Tensor) -> Tensor:
    """-log sigmoid(better - worse), elementwise: the pair loss of both stages."""
    return F.softplus(worse - better)


def ranked_right(better: Tensor, worse: Tensor, same: Tensor) -> Tensor:
    """1 where ``better`` scores higher, 0 where lower, 1/2 where nothing decides; fp32, elementwise.

    ``same`` (bool): both have the same tokens, whose scores differ by rounding alone.
    """
    right = (better > worse).float() + 0.5 * (better == worse)
    return torch.where(same, 0.5, right)


@dataclass(frozen=True)
class PairScores:
    """The scores in one pack that its part of the alignment loss reads.

    n (response, side) pairs whose student branch lies in the pack, m teacher branches. A split tree's teacher stands in
    every part with that part's students; ``teacher_weight`` counts its square, and the fallback, in one part only.
    """

    student: Tensor  # (n,) corrected for length, as the pairs compare them
    teacher: Tensor  # (n,) the teacher's score of the same prompt and side
    student_raw: Tensor  # (n,)
    teacher_raw: Tensor  # (m,)
    teacher_weight: Tensor  # (m,) fp32: responses of the prompt (invalid ones too), or 0 in later parts


def alignment_loss(
    scores: PairScores, *, valid_total: int, response_total: int, prompt_total: int, score_penalty: float
) -> Tensor:
    """One pack's share of the discriminator's loss; packs add up to the loss of the global batch.

    Sum over sides of the mean over valid responses of -log sigmoid(D(y+) - D(y)), plus ``score_penalty`` times the mean
    over responses and their four scores of the squares (an invalid response's own scores are 0, its teacher's count).
    Where no response of the global batch is valid, the pair term is 0.01 times the mean over prompts of
    -log sigmoid(D(y+)), both sides.
    """
    if valid_total:
        pair = bradley_terry(scores.teacher, scores.student).sum() / valid_total
    else:
        pair = 0.01 * (F.softplus(-scores.teacher_raw) * (scores.teacher_weight > 0)).sum() / prompt_total
    squares = scores.student_raw.square().sum() + (scores.teacher_raw.square() * scores.teacher_weight).sum()
    return pair + score_penalty * squares / (4 * response_total)


def length_corrected(score: Tensor, tokens: Tensor, beta: float) -> Tensor:
    """score - beta * log(1 + tokens of the part)."""
    return score if beta == 0 else score - beta * torch.log1p(tokens.to(score.dtype))
