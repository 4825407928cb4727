"""Which records a step takes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def order(count: int, seed: int, start: int, number: int) -> list[int]:
    """Entries [start, start + number) of an endless sequence of shuffled epochs over ``count`` records.

    A function of its arguments, so that a run resumes at any position.
    """
    picked: list[int] = []
    while len(picked) < number:
        epoch, offset = divmod(start + len(picked), count)
        picked += _epoch(count, seed, epoch)[offset : offset + number - len(picked)].tolist()
    return picked


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))
