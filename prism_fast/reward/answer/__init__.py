"""Whether an answer is right: `judge` is the one door, `is_right` its verdict alone.

README.md has its table of verdicts and the files' map.
"""

from prism_fast.reward.answer.judge import Verdict, is_right, judge

__all__ = ["Verdict", "is_right", "judge"]
