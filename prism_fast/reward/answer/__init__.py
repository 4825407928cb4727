"""Whether an answer is right: `is_right` is the one door. README.md has its table of verdicts and the files' map."""

from prism_fast.reward.answer.judge import is_right

__all__ = ["is_right"]
