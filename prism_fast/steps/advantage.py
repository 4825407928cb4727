"""Scores -> one advantage per response."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast.config import AdvantageConfig, DiscriminatorStep
from prism_fast.records import Scores
from prism_kernels import group_normalize, multi_reward_advantage


def alignment_advantage(
    scores: Scores, group: Tensor, config: AdvantageConfig, step: DiscriminatorStep, accuracy: Tensor | None = None
) -> Tensor:
    """(B,) advantages of the adversarial stage from the discriminator's scores, clamped here and only here."""
    perception, reasoning = clamped_scores(scores, group, step)
    return multi_reward_advantage(
        perception,
        reasoning,
        group,
        format_valid=scores.format_valid,
        accuracy=accuracy,
        **config.model_dump(),
    )


def clamped_scores(scores: Scores, group: Tensor, step: DiscriminatorStep) -> list[Tensor]:
    """(B,) of each side, as an advantage reads them."""
    return [_bounds(scores, group, side, step).clamped for side in names.SIDES]


def response_reward(scores: Scores, group: Tensor, config: AdvantageConfig, step: DiscriminatorStep) -> Tensor:
    """(B,): one number per response, for a trainer that takes one and makes an advantage of it by itself.

    The weighted sum of both sides' scores less the teacher's, clamped as `alignment_advantage` clamps them. An invalid
    response has what no valid one is below, less the format's penalty.
    """
    weights = (config.perception_weight, config.reasoning_weight)
    sides = (_bounds(scores, group, side, step) for side in names.SIDES)
    valid = sum(weight * (side.clamped - side.middle) for weight, side in zip(weights, sides))
    invalid = -sum(weights) * step.score_clamp - config.format_penalty
    return torch.where(scores.format_valid, valid, invalid)


def advantage_metrics(scores: Scores, group: Tensor, step: DiscriminatorStep, advantages: Tensor) -> dict[str, float]:
    """How much the clamp took, how far apart a group's scores are, which z blows up to 1, and what came of both."""
    found: dict[str, float] = {names.ADVANTAGE_STD: float(advantages.std()) if len(advantages) > 1 else 0.0}
    valid = scores.format_valid
    several = [rows for g in group.unique() if len(rows := (valid & (group == g)).nonzero().flatten()) > 1]
    for side in names.SIDES if valid.any() else ():
        given, clamped, _ = _bounds(scores, group, side, step)
        found[names.CLAMPED[side]] = float((given != clamped)[valid].float().mean())
        if several:
            found[names.SCORE_SPREAD[side]] = median(float(clamped[rows].std()) for rows in several)
    return found


class _Bounded(NamedTuple):
    given: Tensor  # (B,)
    clamped: Tensor
    middle: Tensor | float  # of the range


def _bounds(scores: Scores, group: Tensor, side: str, step: DiscriminatorStep) -> _Bounded:
    """A side's scores, to at most ``score_clamp`` from the teacher's of the same prompt.

    No loss says where 0 is: a discriminator tells teacher from student by scores that may all be below -10, and the
    published clamp then makes them one. Around the teacher's only what is far from it is cut.
    """
    given = getattr(scores, side)
    middle = 0.0 if step.compat.clamp_around_zero else getattr(scores, f"teacher_{side}")[group]
    return _Bounded(given, given.clamp(middle - step.score_clamp, middle + step.score_clamp), middle)


def reward_advantage(reward: Tensor, group: Tensor, objective: str) -> Tensor:
    """(B,) advantages of verifiable rewards: normalised in the group; Dr.GRPO subtracts the mean only."""
    return group_normalize(reward, group, scale="none" if objective == "dr_grpo" else "std")
