"""Scores -> one advantage per response."""

from __future__ import annotations

from torch import Tensor

from prism_fast.config import AdvantageConfig
from prism_fast.records import Scores
from prism_kernels import group_normalize, multi_reward_advantage


def alignment_advantage(
    scores: Scores, group: Tensor, config: AdvantageConfig, clamp: float, accuracy: Tensor | None = None
) -> Tensor:
    """(B,) advantages of the adversarial stage from the discriminator's scores, clamped here and only here."""
    return multi_reward_advantage(
        scores.perception.clamp(-clamp, clamp),
        scores.reasoning.clamp(-clamp, clamp),
        group,
        format_valid=scores.format_valid,
        accuracy=accuracy,
        **config.model_dump(),
    )


def reward_advantage(reward: Tensor, group: Tensor, objective: str) -> Tensor:
    """(B,) advantages of verifiable rewards: normalised in the group; Dr.GRPO subtracts the mean only."""
    return group_normalize(reward, group, scale="none" if objective == "dr_grpo" else "std")
