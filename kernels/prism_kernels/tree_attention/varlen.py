"""Calls of a variable-length attention in plain torch, on any device, any depth; see calls.py.

No more than a block of scores is ever there, in at least fp32: what a GPU takes for fp32 and fp64 tensors, which no
library takes.
"""

from __future__ import annotations

from torch import Tensor

from prism_kernels.tree_attention.calls import Attention, attend
from prism_kernels.tree_attention.layout import TreeLayout


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor | None = None
) -> Tensor:
    """q (T or Q, Hq, D), k and v (T, Hkv, D) -> as q."""
    return attend(Attention(q, k, v, query_row, layout.segments, scale, True, "torch"))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, causal: bool) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> as q."""
    return attend(Attention(q, k, v, None, layout.segments, scale, causal, "torch"))
