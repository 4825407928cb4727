"""What api.py hands to the implementations of sample_tokens. B rows, V words."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Draw(NamedTuple):
    """One call, checked.

    >>> Draw(logits, seed=torch.tensor([7]), response=torch.tensor([3, 4]), step=torch.tensor([0, 0]),
    ...      temperature=1.0, forbidden=[151655], words=151669, first_allowed=0)
    """

    logits: Tensor  # (B, V) floating
    seed: Tensor  # (1,) int64, its 64 bits
    response: Tensor  # (B,) int64
    step: Tensor  # (B,) int64 in [0, 2^32)
    temperature: float  # 0: the most probable word
    forbidden: list[int]  # ascending, each once, below words
    words: int  # ids from here on are never drawn
    first_allowed: int  # the smallest id that may be drawn

    @property
    def wide(self) -> torch.dtype:
        """What scores are computed in: fp32, or fp64 where logits are."""
        return torch.promote_types(self.logits.dtype, torch.float32)

    @property
    def inverse(self) -> float:
        """Logits times this, rounded to ``wide``, are the scores without noise: a product of two floating-point numbers
        has the same bits everywhere, a GPU's division has not."""
        return 1.0 / (self.temperature or 1.0)
