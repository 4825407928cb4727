"""Plain torch that makes noise for those words alone that can win.

Noise lies below `noise.LARGEST`, so a word whose logit lies that much below the score of the most probable word loses
whatever its noise is: the result is the reference's. Rows go in blocks, so that memory is bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.sample_tokens import noise
from prism_kernels.sample_tokens.records import Draw

NUMBERS = 1 << 18  # logits at a time
NEVER, INFINITY = float("-inf"), float("inf")


def sample_tokens(draw: Draw) -> tuple[Tensor, Tensor]:
    rows = max(1, NUMBERS // draw.logits.shape[1])
    blocks = zip(draw.logits.split(rows), draw.response.split(rows), draw.step.split(rows))
    token, logprob = map(torch.cat, zip(*[_block(draw, *block) for block in blocks]))
    return token, logprob


def _block(draw: Draw, logits: Tensor, response: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """(token, log-prob) of some rows (b, V)."""
    z = logits[:, : draw.words].to(draw.wide) * draw.inverse
    if draw.forbidden:
        z[:, draw.forbidden] = NEVER
    top, token = z.max(-1)
    total = (z - top[:, None]).exp_().sum(-1)  # NaN where a number is NaN or +inf, or where all are -inf
    if total.isnan().any():
        z = z.nan_to_num_(nan=NEVER, posinf=INFINITY, neginf=NEVER)
        top, token = z.max(-1)
    if draw.temperature > 0:
        token = _winner(draw.seed, z, top, token, response, step)
    token = torch.where(top > NEVER, token, draw.first_allowed)
    return token, (z.gather(-1, token[:, None])[:, 0] - top - total.log()).float()


def _winner(seed: Tensor, z: Tensor, top: Tensor, first: Tensor, response: Tensor, step: Tensor) -> Tensor:
    """The word of the largest score, the first of equals; ``first`` has the largest logit, ``top``."""
    known = top + noise.gumbel(noise.bits(seed, response, step, first))
    row, word = ((z + noise.LARGEST >= known[:, None]) & (z > NEVER)).nonzero(as_tuple=True)
    if len(row) > noise.calls(z.shape[1]) * len(z):  # as one call serves four words
        return (z + noise.gumbel(noise.row_bits(seed, response, step, z.shape[1]))).argmax(-1)
    scores = z[row, word] + noise.gumbel(noise.bits(seed, response[row], step[row], word))
    best = torch.full_like(top, NEVER).scatter_reduce(0, row, scores, "amax")
    wins = scores == best[row]
    return torch.full_like(first, z.shape[1]).scatter_reduce(0, row[wins], word[wins], "amin")
