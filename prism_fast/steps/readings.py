"""Numbers that a step leaves on its device, read at once: every read is a wait for all that was launched before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast.steps.expert_load import ExpertLoad


def read(numbers: Sequence[Tensor]) -> list[float]:
    """0-d tensors of one device as Python's numbers, exactly (integers below 2^53), in one copy."""
    return torch.stack([number.detach().double() for number in numbers]).tolist() if numbers else []


def read_with_load(rows: Sequence[Tensor], load: ExpertLoad) -> list[Tensor]:
    """`read_rows`, and in the same copy what ``load`` has counted."""
    counts = load.row()
    found = read_rows([*rows, *([] if counts is None else [counts])])
    if counts is not None:
        load.settle(found.pop())
    return found


def read_rows(rows: Sequence[Tensor]) -> list[Tensor]:
    """1-D tensors of one device and dtype, on the host, in one copy."""
    return list(torch.cat(list(rows)).detach().cpu().split([len(row) for row in rows])) if rows else []
