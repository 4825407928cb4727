"""DecodeLayout: which prompt each row of a decoding step continues.

B rows (one new token each), G groups (one prompt each), P tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_kernels.checks import check_device, check_tensor, check_values, describe, integer, items, wrong

MAX_TOKENS = 1 << 24  # of a prompt: more than any model reads, and a mask of them fits a memory


@dataclass(frozen=True, eq=False)
class DecodeLayout:
    """Rows of a group stand together in a (G, width) grid, so that they share each read of their prompt.

    >>> DecodeLayout.build(group=torch.tensor([0, 1, 1, 0]), prompt_lengths=[3, 2]).slot.tolist()
    [0, 2, 3, 1]
    """

    group: Tensor  # (B,) int64
    prompt_mask: Tensor  # (G, P) bool: the prompt has a token there
    slot: Tensor  # (B,) int64: cell of the grid, flat
    width: int  # rows of the largest group

    @classmethod
    def build(cls, group: Tensor, prompt_lengths: Sequence[int]) -> DecodeLayout:
        """``group`` (B,) int64 in [0, G), in any order, on the device of the keys; ``prompt_lengths``: G, >= 1 each.

        Raises ValueError naming the argument; values of ``group`` outside are undefined on a GPU.
        """
        numbers = items("prompt_lengths", prompt_lengths, "a list of numbers of tokens")
        lengths = torch.tensor([integer("prompt_lengths", n, 1, MAX_TOKENS) for n in numbers], dtype=torch.int64)
        if not lengths.numel():
            raise wrong("prompt_lengths", "one number of tokens per group", "none")
        check_tensor("group", group, {"B": None}, [torch.int64])
        if not group.numel() or group.device.type == "meta":  # the grid is laid out by values
            raise wrong("group", "B >= 1 rows", describe(group))
        check_values("group", group, "G", len(lengths))
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return cls._placed(group, mask.to(group.device))

    def keep(self, rows: Tensor) -> DecodeLayout:
        """Of these rows (n,) int64 in [0, B) alone, in this order; n >= 1. Raises ValueError, as :meth:`build`."""
        check_tensor("rows", rows, {"n": None}, [torch.int64])
        check_device("rows", rows, "group", self.group)
        if not rows.numel():
            raise wrong("rows", "n >= 1 rows", describe(rows))
        check_values("rows", rows, "B", len(self.group))
        return self._placed(self.group[rows], self.prompt_mask)

    @classmethod
    def _placed(cls, group: Tensor, prompt_mask: Tensor) -> DecodeLayout:
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=len(prompt_mask))
        first = torch.cumsum(counts, 0) - counts
        within = torch.empty_like(group)
        within[order] = torch.arange(len(group), device=group.device) - first[group[order]]
        width = int(counts.max())
        return cls(group, prompt_mask, group * width + within, width)
