"""Decoding over dense caches that grow, for the sampler until its caches are pages: plain torch, no op.

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
class DenseLayout:
    """Rows of a group stand together in a (G, width) grid, so that they share each read of their prompt.

    >>> DenseLayout.build(group=torch.tensor([0, 1, 1, 0]), prompt_lengths=[3, 2]).slot.tolist()
    [0, 2, 3, 1]
    """

    group: Tensor  # (B,) int64
    prompt_mask: Tensor  # (G, P) bool: the prompt has a token there
    slot: Tensor  # (B,) int64: cell of the grid, flat
    width: int  # rows of the largest group

    @classmethod
    def build(cls, group: Tensor, prompt_lengths: Sequence[int]) -> DenseLayout:
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

    def keep(self, rows: Tensor) -> DenseLayout:
        """Of these rows (n,) int64 in [0, B) alone, in this order; n >= 1. Raises ValueError, as :meth:`build`."""
        check_tensor("rows", rows, {"n": None}, [torch.int64])
        check_device("rows", rows, "group", self.group)
        if not rows.numel():
            raise wrong("rows", "n >= 1 rows", describe(rows))
        check_values("rows", rows, "B", len(self.group))
        return self._placed(self.group[rows], self.prompt_mask)

    @classmethod
    def _placed(cls, group: Tensor, prompt_mask: Tensor) -> DenseLayout:
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=len(prompt_mask))
        first = torch.cumsum(counts, 0) - counts
        within = torch.empty_like(group)
        within[order] = torch.arange(len(group), device=group.device) - first[group[order]]
        width = int(counts.max())
        return cls(group, prompt_mask, group * width + within, width)


def dense_decode(
    q: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, layout: DenseLayout, scale: float
) -> Tensor:
    """Scores of both kinds go through one softmax, so the result is exact."""
    batch, heads, dim = q.shape
    kv_heads = own_k.shape[1]
    queries = q.reshape(batch, kv_heads, heads // kv_heads, dim) * scale
    on_prompt = _ungrid(_grid(queries, layout) @ prompt_k.transpose(2, 3), layout)  # (B, Hkv, rep, P)
    on_prompt = on_prompt.masked_fill(~layout.prompt_mask[layout.group][:, None, None], float("-inf"))
    on_own = queries @ own_k.transpose(2, 3)  # (B, Hkv, rep, L)
    scores = torch.cat([on_prompt, on_own], dim=-1)
    weight = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    prompt_weight, own_weight = weight.split([on_prompt.shape[-1], on_own.shape[-1]], dim=-1)
    out = _ungrid(_grid(prompt_weight, layout) @ prompt_v, layout) + own_weight @ own_v
    return out.reshape(batch, heads, dim)


def _grid(x: Tensor, layout: DenseLayout) -> Tensor:
    """(B, Hkv, rep, n) -> (G, Hkv, width * rep, n); cells without a row are 0."""
    _, kv_heads, rep, n = x.shape
    width = layout.width
    grid = x.new_zeros(len(layout.prompt_mask) * width, kv_heads, rep, n).index_copy(0, layout.slot, x)
    return grid.view(-1, width, kv_heads, rep, n).transpose(1, 2).reshape(-1, kv_heads, width * rep, n)


def _ungrid(grid: Tensor, layout: DenseLayout) -> Tensor:
    groups, kv_heads, both, n = grid.shape
    width = layout.width
    grid = grid.view(groups, kv_heads, width, both // width, n).transpose(1, 2)
    return grid.reshape(groups * width, kv_heads, both // width, n)[layout.slot]
