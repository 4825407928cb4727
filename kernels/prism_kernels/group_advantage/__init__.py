"""Group-relative advantages: normalise scores within a group, and combine several rewards into one advantage."""

from prism_kernels.group_advantage.api import group_normalize, multi_reward_advantage

__all__ = ["group_normalize", "multi_reward_advantage"]
