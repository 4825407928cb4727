"""The definition: every word's score, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.sample_tokens import noise
from prism_kernels.sample_tokens.records import Draw


def sample_tokens(draw: Draw) -> tuple[Tensor, Tensor]:
    """(token (B,) int64, log-prob (B,) fp32)."""
    word = torch.arange(draw.logits.shape[1], device=draw.logits.device)
    barred = word >= draw.words
    for forbidden in draw.forbidden:
        barred |= word == forbidden
    z = (draw.logits.to(draw.wide) * draw.inverse).masked_fill(barred, float("-inf"))  # (B, V)
    score = z
    if draw.temperature > 0:
        score = z + noise.gumbel(noise.bits(draw.seed, draw.response[:, None], draw.step[:, None], word))
    score = score.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    token = torch.where(score.amax(-1) > float("-inf"), score.argmax(-1), draw.first_allowed)  # the first of equals
    return token, z.log_softmax(-1).gather(-1, token[:, None])[:, 0].float()
