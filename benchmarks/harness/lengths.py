"""Lengths of random data: what models write is ragged, and what is measured on equal lengths alone flatters padding."""

from __future__ import annotations

import torch

SIGMA = 0.45  # of the logarithm of a response's length


def factors(count: int, sigma: float, random: torch.Generator) -> list[float]:
    """Log-normal, of mean 1. ``sigma`` 0: all 1, and nothing is drawn."""
    if not sigma:
        return [1.0] * count
    drawn = torch.randn(count, generator=random, dtype=torch.float64)
    return (sigma * drawn - sigma**2 / 2).exp().tolist()


def scaled(length: int, factor: float) -> int:
    """In tokens, one at least."""
    return max(1, round(length * factor))
