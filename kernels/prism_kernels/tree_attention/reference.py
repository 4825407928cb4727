"""The definition: dense masked softmax attention over the whole stream."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.tree_attention.layout import TreeLayout


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor | None = None
) -> Tensor:
    """q (T or Q, Hq, D), k and v (T, Hkv, D) -> as q; at least fp32 inside."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    queries = q.to(wide).transpose(0, 1)  # (Hq, T, D)
    keys = k.to(wide).repeat_interleave(repeat, dim=1).transpose(0, 1)
    values = v.to(wide).repeat_interleave(repeat, dim=1).transpose(0, 1)
    allowed = layout.allowed() if query_row is None else layout.allowed()[query_row]
    logits = (queries @ keys.transpose(1, 2)) * scale  # (Hq, T or Q, T)
    logits = logits.masked_fill(~allowed, float("-inf"))
    return (torch.softmax(logits, dim=-1) @ values).transpose(0, 1).to(q.dtype)
